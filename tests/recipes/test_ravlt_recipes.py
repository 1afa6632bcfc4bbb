"""The published recipes of RAVLT: decay, rates and averages, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/ravlt/')]
IMAGENET = [leaf for leaf in ALL if entry_of(leaf).task == 'cls']
DENSE = [leaf for leaf in ALL if leaf not in IMAGENET]
DROP_PATH = dict(tiny=0.1, small=0.15, base=0.4, large=0.55)
#: {kind: (its archs, decay)}
KINDS = {'/mask-rcnn_ravlt-%s_fpn_1x': (('tiny', 'small', 'base', 'large'), 0.05),
         '/mask-rcnn_ravlt-%s_fpn_ms-3x': (('small', 'base', 'large'), 0.05),
         '/cascade-mask-rcnn_ravlt-%s_fpn_ms-3x': (('small', 'base', 'large'), 0.05),
         '/retinanet_ravlt-%s_fpn_1x': (('tiny', 'small', 'base', 'large'), 1e-4),
         '/semantic-fpn_ravlt-%s_8xb2-80k': (('tiny', 'small', 'base', 'large'), 1e-4),
         '/upernet_ravlt-%s_8xb2-160k': (('small', 'base', 'large'), 0.01)}


def test_published_rows():
    assert {entry_of(leaf).arch for leaf in IMAGENET} == set(DROP_PATH)
    assert sorted(DENSE) == sorted(
        leaf for kind, (archs, _) in KINDS.items() for arch in archs
        for leaf in DENSE if kind % arch in leaf)


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet(leaf, load, build_meta):
    from mmengine.registry import HOOKS
    cfg, model = load(leaf), build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[entry_of(leaf).arch]
    assert cfg.optim_wrapper.clip_grad is None and cfg.sync_bn == 'torch' and cfg.val_cfg.fp16
    assert cfg.train_dataloader.sampler == dict(type='RepeatAugSampler')
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 1024
    settings, _ = settings_of(model, cfg)
    for name, found in settings.items():  # the factors of branches have four dimensions
        is_free = model.get_parameter(name).ndim == 1 or name.endswith('.bias')
        assert found == (1.0, 0.0 if is_free else 0.05), name
    assert settings['backbone.stages.0.blocks.0.gamma_1'] == (1.0, 0.05)
    found = learning_rates(cfg, 2, 600)
    assert found[0] == found[1] == pytest.approx(1e-6)  # epoch by epoch
    assert max(found) == pytest.approx(1e-3) and found.index(max(found)) in (8, 10)
    assert found[-1] == pytest.approx(1e-5, rel=0.01)
    ema, = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    assert ema.ema_cfg['update_buffers']
    assert 1 - ema.ema_cfg['momentum'] == pytest.approx(0.99996 ** 2, abs=1e-7)


def is_free(leaf, name):
    """Whether a parameter has no decay: nothing of it is said in RetinaNet and Semantic FPN."""
    if 'retinanet' in leaf or 'semantic-fpn' in leaf:
        return False
    if 'cascade' in leaf:  # norms of all modules, whatever their names are
        return 'norm' in name or '.bn.' in name
    return 'norm' in name and 'patch_embed' not in name


@pytest.mark.parametrize('leaf', DENSE)
def test_dense(leaf, load, build_meta):
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch] and not model.backbone.norm_eval
    assert cfg.model.backbone.init_cfg.weights == 'model' and cfg.sync_bn == 'torch'
    decay = next(decay for kind, (_, decay) in KINDS.items() if kind % arch in leaf)
    assert cfg.optim_wrapper.optimizer.lr == (6e-5 if 'upernet' in leaf else 1e-4)
    for name, found in settings_of(model, cfg)[0].items():
        assert found == (1.0, 0.0 if is_free(leaf, name) else decay), name
    assert cfg.optim_wrapper.type == ('OptimWrapper' if 'semantic-fpn' in leaf
                                      else 'AmpOptimWrapper')
    assert cfg.optim_wrapper.get('loss_scale') == (
        512.0 if 'retinanet' in leaf or 'upernet' in leaf else None)
    first, last = cfg.param_scheduler[0], cfg.param_scheduler[-1]
    if 'coco' in leaf:
        assert (first.start_factor, first.end) == (0.001, 500)
        assert cfg.train_cfg.max_epochs == (36 if '3x' in leaf else 12)
        assert last.milestones == ([27, 33] if '3x' in leaf else [8, 11])
        is_single = '/mask-rcnn_ravlt-large' in leaf and '3x' in leaf
        assert cfg.train_dataloader.batch_size == (1 if is_single else 2)
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
    elif 'upernet' in leaf:
        assert cfg.train_cfg.max_iters == last.end == 160000
        assert (first.start_factor, first.end, last.power) == (1e-6, 1500, 1.0)
    else:
        assert cfg.train_cfg.max_iters == last.end == 80000
        assert (last.power, last.eta_min) == (0.9, 1e-6)


# --- a step of training, and a prediction ---------------------------------------------------------

CHANNELS = [8, 16, 16, 24]
ARCH = dict(embed_dims=CHANNELS, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 3),
            mlp_ratios=(2, 2, 2, 2), layer_scales=(1.0, 1.0, 1e-2, 1e-2))


def narrowed(cfg):
    """The model of a config with four blocks, for images of 64 pixels."""
    model = cfg.model
    model.backbone.arch = dict(ARCH)
    model.backbone.pop('init_cfg', None)
    model.backbone.drop_path_rate = 0.0  # it could leave a block out for both images
    narrow_heads(cfg, CHANNELS)
    if cfg.default_scope == 'mmpretrain':
        model.backbone.projection = model.head.in_channels = 32
    return model


@pytest.mark.parametrize('leaf', [IMAGENET[0], *(
    next(leaf for leaf in DENSE if kind.partition('%')[0] in leaf) for kind in KINDS
    if 'ms-3x' not in kind or 'cascade' in kind)])
def test_one_step_and_a_prediction(leaf, load):
    take_a_step(load(leaf), narrowed)
