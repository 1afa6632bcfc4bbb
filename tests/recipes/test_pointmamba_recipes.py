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


@pytest.mark.parametrize('leaf', MINE)
def test_points(leaf, load):
    """Of each data set, as many as its groups are made for."""
    cfg = load(leaf)
    many = 'modelnet40' not in leaf and 'shapenet55' not in leaf
    assert cfg.model.backbone.arch.endswith('g128' if many else 'g64')
    wanted = 2048 if many else 1024
    preprocessor = cfg.model.data_preprocessor
    is_class = cfg.model.type == 'vmamba_mm.PointClassifier'
    if is_class:
        assert (preprocessor.num_points, preprocessor.pool) == (wanted, wanted * 1200 // 1024)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        steps = {s.type.partition('.')[2]: s for s in loader.dataset.pipeline}
        # ScanObjectNN is as it is stored; what is classified is only shuffled, and in training.
        assert ('NormalizePoints' in steps) == ('scanobjectnn' not in leaf)
        sample = steps.get('SamplePoints')
        if is_class:
            assert (sample is not None) == (loader is cfg.train_dataloader)
            assert sample is None or 'num' not in sample
        else:
            assert (sample.num, sample.get('replace', False)) == (wanted, 'part' in leaf)


@pytest.mark.parametrize('drawn', [False, True])
def test_few_shot(drawn, load):
    end = '-drawn' if drawn else ''
    cfg = load('configs/pointmamba/few_shot/pointmamba_1xb32-150e_modelnet40-5way-10shot'
               f'{end}.py')
    rates = learning_rates(cfg, 2, 300)
    assert cfg.train_cfg.max_epochs == 150 and cfg.train_dataloader.batch_size == 32
    assert rates[0] == pytest.approx(1e-6) and rates[20] == pytest.approx(5e-4)
    assert rates[-1] == pytest.approx(1e-6, rel=0.5)
    assert cfg.model.backbone.arch == 'hilbert_g64' and cfg.model.backbone.drop_path_rate == 0.5
    assert [a.type for a in cfg.model.data_preprocessor.augments] == ['scale_shift']
    for loader, split in ((cfg.train_dataloader, 'train'), (cfg.test_dataloader, 'test')):
        task = loader.dataset
        assert (task.type, task.split) == ('vmamba_mm.ModelNetFewShot', split)
        assert (task.way, task.shot, task.fold) == (cfg.model.head.num_classes, 10, 0)
        assert task.get('draw', False) == drawn
