"""The published recipes of RMT: decay, rates and averages, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/rmt/')]
IMAGENET = [leaf for leaf in ALL if entry_of(leaf).task == 'cls']
DENSE = [leaf for leaf in ALL if leaf not in IMAGENET]
DROP_PATH = dict(tiny=0.1, small=0.15, base=0.4, large=0.5)
#: {kind: (its archs, decay)}
KINDS = {'/mask-rcnn_rmt-%s_fpn_1x': (('tiny', 'small', 'base', 'large'), 0.05),
         '/mask-rcnn_rmt-%s_fpn_ms-3x': (('small', 'base'), 0.05),
         '/cascade-mask-rcnn_rmt-%s_fpn_ms-3x': (('small', 'base'), 0.05),
         '/retinanet_rmt-%s_fpn_1x': (('tiny', 'small', 'base', 'large'), 1e-4),
         '/semantic-fpn_rmt-%s_8xb2-80k': (('tiny', 'small', 'base', 'large'), 1e-4),
         '/upernet_rmt-%s_8xb2-160k': (('small', 'base', 'large'), 0.01)}


def test_published_rows():
    assert [entry_of(leaf).arch for leaf in IMAGENET] == sorted(DROP_PATH)
    assert sorted(DENSE) == sorted(
        leaf for kind, (archs, _) in KINDS.items() for arch in archs
        for leaf in DENSE if kind % arch in leaf)


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet(leaf, load, build_meta):
    from mmengine.registry import HOOKS
    cfg, model = load(leaf), build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[entry_of(leaf).arch]
    assert cfg.optim_wrapper.clip_grad is None and cfg.sync_bn == 'torch'
    assert cfg.train_dataloader.sampler == dict(type='RepeatAugSampler')
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 2048
    settings, _ = settings_of(model, cfg)
    for name, found in settings.items():
        is_free = model.get_parameter(name).ndim == 1 or name.endswith('.bias')
        assert found == (1.0, 0.0 if is_free else 0.05), name
    found = learning_rates(cfg, 2, 600)
    assert found[0] == found[1] == pytest.approx(1e-6)  # epoch by epoch
    assert max(found) == pytest.approx(2e-3) and found.index(max(found)) in (8, 10)
    assert found[-1] == pytest.approx(1e-5, rel=0.01)
    ema, = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    assert ema.ema_cfg['update_buffers']
    assert 1 - ema.ema_cfg['momentum'] == pytest.approx(0.99996 ** 4, abs=1e-7)


@pytest.mark.parametrize('leaf', DENSE)
def test_dense(leaf, load, build_meta):
    """Norms have no decay but in the stem; nothing is said of norms in Semantic FPN."""
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch] and not model.backbone.norm_eval
    decay = next(decay for kind, (_, decay) in KINDS.items() if kind % arch in leaf)
    if 'upernet' in leaf or 'semantic-fpn' in leaf:
        rate = 6e-5 if 'upernet' in leaf else 1e-4
    else:
        rate = 2e-4 if arch == 'large' or '3x' in leaf and arch == 'base' else 4e-4
    assert cfg.optim_wrapper.optimizer.lr == rate
    for name, found in settings_of(model, cfg)[0].items():
        is_free = 'norm' in name and 'patch_embed' not in name and 'semantic-fpn' not in leaf
        assert found == (1.0, 0.0 if is_free else decay), name
    assert cfg.optim_wrapper.type == ('OptimWrapper' if 'semantic-fpn' in leaf
                                      else 'AmpOptimWrapper')
    last = cfg.param_scheduler[-1]
    if 'coco' in leaf:
        assert cfg.train_cfg.max_epochs == (36 if '3x' in leaf else 12)
        assert last.milestones == ([27, 33] if '3x' in leaf else [8, 11])
    else:
        assert cfg.train_cfg.max_iters == last.end == (160000 if 'upernet' in leaf else 80000)
        assert last.power == (1.0 if 'upernet' in leaf else 0.9)


# --- a step of training, and a prediction ---------------------------------------------------------

CHANNELS = [8, 16, 16, 24]
ARCH = dict(embed_dims=CHANNELS, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 3),
            mlp_ratios=(2, 2, 2, 2), layer_scales=(0, 0, 1e-2, 1e-2))


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
