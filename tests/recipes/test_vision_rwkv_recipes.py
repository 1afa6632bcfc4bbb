"""The published recipes of Vision-RWKV: decay, rates and paths, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import SIZE, learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/vision_rwkv/')]
IMAGENET, COCO, ADE20K = ([leaf for leaf in ALL if entry_of(leaf).task == task]
                          for task in ('cls', 'det', 'seg'))
LARGE, = (leaf for leaf in IMAGENET if 'large' in leaf)
DROP_PATH = dict(tiny=0.0, small=0.3, base=0.5)
DENSE_DROP_PATH = dict(tiny=0.1, small=0.2, base=0.3, large=0.4)
LAYER_DECAY = dict(tiny=0.95, small=0.85, base=0.8, large=0.9)  #: of segmentors


def test_published_rows():
    assert {entry_of(leaf).arch for leaf in IMAGENET} == {
        *DENSE_DROP_PATH, 'v6_tiny', 'v6_small', 'v6_base'}
    for leaves in (COCO, ADE20K):
        assert {entry_of(leaf).arch for leaf in leaves} == {*DENSE_DROP_PATH}


@pytest.mark.parametrize('leaf', [leaf for leaf in IMAGENET if leaf != LARGE])
def test_imagenet(leaf, load, build_meta):
    """In fp32, and only norms and biases have no decay."""
    cfg, arch = load(leaf), entry_of(leaf).arch.removeprefix('v6_')
    assert cfg.model.backbone.get('drop_path_rate', 0.0) == DROP_PATH[arch]
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.optimizer.lr) == ('OptimWrapper', 1e-3)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.auto_scale_lr.base_batch_size == 1024 and not cfg.custom_hooks
    assert (cfg.model.train_cfg is None) == (arch == 'tiny')
    for name, found in settings_of(build_meta(leaf), cfg)[0].items():
        is_free = name.endswith('.bias') or any(
            f'{norm}.' in name for norm in ('ln0', 'ln1', 'ln2', 'ln_x', 'norm11'))
        assert found == (1.0, 0.0 if is_free else 0.05), name
    found = learning_rates(cfg, 2, 600)
    assert found[0] == pytest.approx(1e-6) and found[-1] == pytest.approx(1e-5, rel=1e-2)
    assert found[39] == max(found) == pytest.approx(1e-3)


def test_fine_tuning_of_large(load, build_meta):
    """What has one dimension has no decay, but for decays and bonuses of positions."""
    cfg = load(LARGE)
    assert cfg.model.backbone.drop_path_rate == 0.1
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.val_cfg.fp16 and cfg.test_cfg.fp16
    assert (cfg.optim_wrapper.clip_grad, cfg.train_cfg.max_epochs) == (dict(max_norm=1.0), 20)
    assert [(hook.type, hook.momentum) for hook in cfg.custom_hooks] == [('EMAHook', 1e-4)]
    model = build_meta(LARGE)
    for name, found in settings_of(model, cfg)[0].items():
        is_free = model.get_parameter(name).ndim == 1 and not name.endswith(
            ('spatial_decay', 'spatial_first'))
        assert found == (1.0, 0.0 if is_free else 0.05), name
    found = learning_rates(cfg, 2, 40)
    assert found[0] == pytest.approx(1e-8) and found[3] == max(found) == pytest.approx(1e-5)
    assert found[-1] == pytest.approx(1e-7, rel=0.3)


@pytest.mark.parametrize('leaf', COCO + ADE20K)
def test_dense(leaf, load, build_meta):
    """Rates fall by blocks; what has one dimension has no decay."""
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    rate, decay, layer_decay = (
        (6e-5 * (2 if arch == 'tiny' else 1), 0.01, LAYER_DECAY[arch]) if leaf in ADE20K else
        (2e-4, 0.01, 0.85) if arch == 'tiny' else (1e-4, 0.05, 0.85))
    assert cfg.model.backbone.drop_path_rate == DENSE_DROP_PATH[arch]
    assert cfg.model.backbone.features == ('each' if leaf in ADE20K else 'last')
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(rate) and cfg.sync_bn == 'torch'
    assert cfg.optim_wrapper.get('clip_grad') is None
    last = model.backbone.arch['depth'] + 1
    for name, (factor, found) in settings_of(model, cfg)[0].items():
        depth = last
        if name.startswith(('backbone.pos_embed', 'backbone.patch_embed.')):
            depth = 0
        elif name.startswith('backbone.blocks.'):
            depth = int(name.split('.')[2]) + 1
        assert factor == pytest.approx(layer_decay ** (last - depth)), name
        assert found == (0.0 if model.get_parameter(name).ndim == 1 else decay), name
    if leaf in ADE20K:
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.loss_scale == dict(init_scale=512.0)
        found = learning_rates(cfg, cfg.train_cfg.max_iters, 1600)
        assert found[0] == pytest.approx(rate * 1e-6, rel=1e-2) and found[1500] == max(found)
    else:
        assert (cfg.optim_wrapper.type, cfg.train_cfg.max_epochs) == ('OptimWrapper', 12)
        assert [item.get('milestones') for item in cfg.param_scheduler] == [None, [8, 11]]


def narrowed(cfg):
    """The model of a config with four blocks of 12 channels, for images of 64 pixels."""
    backbone, channels = cfg.model.backbone, [12] * 4
    mixer = dict(head_dim=6) if 'v6' in str(backbone.arch) else {}
    backbone.arch = dict(base=backbone.arch.get('base') if isinstance(backbone.arch, dict)
                         else backbone.arch, embed_dims=12, depth=4, image_size=SIZE, **mixer)
    backbone.pop('init_cfg', None)
    backbone.drop_path_rate = 0.0  # it could leave a block out for both images
    if cfg.default_scope != 'mmpretrain':
        backbone.update(conv_inplane=8, deform_num_heads=3)
    if cfg.default_scope == 'mmseg':
        cfg.model.test_cfg.update(crop_size=(SIZE, SIZE), stride=(43, 43))
    narrow_heads(cfg, channels)
    return cfg.model


@pytest.mark.parametrize('leaf', [*IMAGENET[-2:], LARGE, COCO[0], ADE20K[0]])
def test_one_step_and_a_prediction(leaf, load):
    # The injectors' factors are 0 at first, and queries go through linear layers of zeros.
    take_a_step(load(leaf), narrowed, behind_zeros=r'injector\.(feat_norm|attn)\.|\.query_norm\.')
