"""The published recipes of MILA: decay, rates, averages and MESA, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/mila/')]
IMAGENET, COCO, ADE20K = ([leaf for leaf in ALL if entry_of(leaf).task == task]
                          for task in ('cls', 'det', 'seg'))
DROP_PATH = dict(tiny=0.2, small=0.3, base=0.5)
MESA = dict(tiny=1.0, small=1.5, base=2.0)
#: images on each of 8 GPUs, of which the rate is 5e-4 for 512
BATCH = dict(tiny=128, small=64, base=64)


def test_published_rows():
    assert {entry_of(leaf).arch for leaf in IMAGENET} == set(MESA)
    assert {(entry_of(leaf).arch, '3x' in leaf) for leaf in COCO} == {
        ('tiny', False), ('small', False), ('base', False), ('tiny', True), ('small', True)}
    assert [entry_of(leaf).arch for leaf in ADE20K] == ['base']
    assert all(entry_of(leaf).metadata['Trained With'] == 'MESA' for leaf in IMAGENET)


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet(leaf, load, build_meta):
    from mmengine.registry import HOOKS
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    batch = 8 * BATCH[arch]
    rate = 5e-4 * batch / 512
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch]
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert not cfg.val_cfg.fp16 and not cfg.test_cfg.fp16
    assert cfg.optim_wrapper.optimizer.lr == rate
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch
    settings, _ = settings_of(model, cfg)
    for name, found in settings.items():
        is_free = model.get_parameter(name).ndim == 1 or name.endswith('.bias')
        assert found == (1.0, 0.0 if is_free else 0.05), name
    found = learning_rates(cfg, 2, 600)
    assert found[0] == pytest.approx(rate / 1000)
    assert max(found) == found[39] == pytest.approx(rate)
    assert found[-1] == pytest.approx(rate / 100, rel=1e-2)
    ema, mesa = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    assert ema.ema_cfg['update_buffers']
    assert 1 - ema.ema_cfg['momentum'] == pytest.approx(0.9996 ** (batch / 4096), abs=1e-7)
    assert (mesa.value, cfg.train_cfg.max_epochs * mesa.begin) == (MESA[arch], 75)


@pytest.mark.parametrize('leaf', COCO + ADE20K)
def test_dense(leaf, load, build_meta):
    """Batch norms have no decay, everything else has it; 12 epochs have the crops of 36."""
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    rate = 0.5 if leaf in ADE20K else 0.3 if '3x' in leaf else 0.1
    assert cfg.model.backbone.drop_path_rate == rate
    assert cfg.model.backbone.arch == arch and cfg.model.backbone.init_cfg.weights == 'model'
    assert not model.backbone.norm_eval and cfg.optim_wrapper.type == 'OptimWrapper'
    decay, rate = (0.05, 1e-4) if leaf in COCO else (0.01, 6e-5)
    assert cfg.optim_wrapper.optimizer.lr == rate
    for name, found in settings_of(model, cfg)[0].items():
        assert found == (1.0, 0.0 if 'norm' in name else decay), name
    if leaf in COCO:
        warmup, steps = cfg.param_scheduler
        assert warmup.end == 500 and 'RandomChoice' in [
            step.type for step in cfg.train_dataloader.dataset.pipeline]
        assert cfg.train_cfg.max_epochs == steps.end == (36 if '3x' in leaf else 12)
        assert steps.milestones == ([27, 33] if '3x' in leaf else [8, 11])
    else:
        assert cfg.train_cfg.max_iters == 160000
        assert cfg.model.auxiliary_head.in_channels == 384


# --- a step of training, and a prediction ---------------------------------------------------------

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def narrowed(cfg):
    """The model of a config with four blocks, for images of 64 pixels."""
    model = cfg.model
    model.backbone.arch = dict(ARCH)
    model.backbone.pop('init_cfg', None)
    model.backbone.drop_path_rate = 0.0  # it could leave a block out for both images
    narrow_heads(cfg, [8, 16, 32, 64])
    return model


@pytest.mark.parametrize('leaf', [IMAGENET[0], COCO[0], ADE20K[0]])
def test_one_step_and_a_prediction(leaf, load):
    take_a_step(load(leaf), narrowed)
