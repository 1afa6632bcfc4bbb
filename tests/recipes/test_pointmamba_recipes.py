"""The published recipes of PointMamba: rates, decay, schedules, drop paths, data."""

import pytest
from leaves import LEAVES
from small_recipes import learning_rates, settings_of

MINE = [leaf for leaf in LEAVES if '/pointmamba/' in leaf]
#: Of each task the rate, samples of a batch, and what clips gradients.
RATES = {'modelnet40': (3e-4, 32, 10), 'obj-bg': (5e-4, 32, 10), 'obj-only': (3e-4, 32, 10),
         'pb-t50-rs': (5e-4, 32, 10), 'shapenetpart': (2e-4, 16, 10),
         'shapenet55': (1e-3, 128, None)}


@pytest.mark.parametrize('leaf', MINE)
def test_recipe(leaf, load, build_meta):
    cfg, model = load(leaf), build_meta(leaf)
    is_early = 'axes' in leaf
    rate, batch, clip = next(v for key, v in RATES.items() if key in leaf)
    if is_early and 'obj-only' in leaf:
        rate = 1e-4
    assert cfg.train_dataloader.batch_size == batch and cfg.train_cfg.max_epochs == 300
    assert cfg.train_dataloader.drop_last and cfg.auto_scale_lr.base_batch_size == batch
    clipped = cfg.optim_wrapper.clip_grad
    assert (clipped and clipped.max_norm) == clip
    rates = learning_rates(cfg, 2, 600)
    assert rates[0] == rates[1] == pytest.approx(1e-6) and rates[20] == pytest.approx(rate)
    assert rates[10] == pytest.approx(1e-6 + (rate - 1e-6) / 2)
    assert rates[-1] == pytest.approx(1e-6, rel=0.5) and rates[310] == pytest.approx(
        rate / 2, rel=2e-2)
    settings, _ = settings_of(model, cfg)
    for name, (factor, decay) in settings.items():
        parameter = model.get_parameter(name)
        is_free = parameter.dim() == 1 or name.endswith('.bias') or 'token' in name
        assert (factor, decay) == (1.0, 0.0 if is_free else 0.05), name
    drop_path = 0.1 if 'shapenet55' in leaf else 0.2 if 'shapenetpart' in leaf else \
        (0.3 if is_early else 0.1) if 'modelnet40' in leaf else 0.1 if is_early else 0.5
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert model.backbone.drop_rate == (0.1 if not is_early and 'obj-only' in leaf else 0)
    augments = cfg.model.data_preprocessor.augments
    turns = not is_early or '-rot' in leaf
    turns = turns and 'modelnet40' not in leaf and 'shapenetpart' not in leaf
    assert [a.type for a in augments] == ['rotate' if turns else 'scale_shift']


def test_points():
    """Of each data set, as many as its groups are made for."""
    from vmamba_mm import zoo

    for entry in zoo.entries('pointmamba'):
        many = 'modelnet40' not in entry.name and 'shapenet55' not in entry.name
        assert entry.arch.endswith('g128' if many else 'g64')
