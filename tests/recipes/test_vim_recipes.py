"""The published recipes of Vim: decay, rates, and a step of each kind of config."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import SIZE, learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/vim/')]
IMAGENET, COCO, ADE20K = ([leaf for leaf in ALL if entry_of(leaf).task == task]
                          for task in ('cls', 'det', 'seg'))
#: batch, rate for it, decay and drop path of the classifiers
PUBLISHED = {'tiny': (1024, 1e-3, 0.1, 0.0), 'small': (512, 1e-3, 0.05, 0.05),
             'base': (512, 1e-3, 0.05, 0.05), 'tiny_stride8': (1024, 1e-5, 1e-8, 0.0),
             'small_stride8': (1024, 1e-5, 1e-8, 0.0)}


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet(leaf, load, build_meta):
    cfg, arch = load(leaf), entry_of(leaf).arch
    batch, rate, decay, drop_path = PUBLISHED[arch]
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == batch
    assert cfg.model.backbone.get('drop_path_rate', 0.0) == drop_path
    assert cfg.train_dataloader.sampler.type == 'RepeatAugSampler'
    assert cfg.optim_wrapper.type == 'OptimWrapper' and cfg.optim_wrapper.clip_grad is None
    model = build_meta(leaf)
    assert model.backbone.out_type == 'cls_token' and model.neck is None
    assert cfg.optim_wrapper.optimizer.lr == rate
    for name, settings in settings_of(model, cfg)[0].items():
        is_free = model.get_parameter(name).ndim == 1 or name.endswith(
            ('.bias', '_embed', '_token'))
        assert settings == (1.0, 0.0 if is_free else decay), name
    epochs = cfg.train_cfg.max_epochs
    found = learning_rates(cfg, 1, epochs)
    if 'stride8' in arch:
        assert epochs == 30 and set(found) == {1e-5}
        assert cfg.model.backbone.init_cfg.resize == 'published'
        assert cfg.model.head.init_cfg.checkpoint == cfg.model.backbone.init_cfg.checkpoint
    else:
        assert epochs == 300 and found[0] == pytest.approx(1e-6)
        assert max(found) == pytest.approx(1e-3) and found[-1] == pytest.approx(1e-5, rel=0.01)
    hook, = cfg.custom_hooks
    assert hook.type == 'EMAHook' and 1 - hook.momentum == 0.99996


@pytest.mark.parametrize('leaf', ADE20K)
def test_ade20k(leaf, load, build_meta):
    """The stem's rate is lower, as the published layer decay came out."""
    cfg, is_tiny = load(leaf), entry_of(leaf).arch == 'tiny'
    rate, decay, factor = (2e-4, 0.1, 0.92 ** 25) if is_tiny else (1e-4, 0.05, 0.95 ** 25)
    model = build_meta(leaf)
    assert cfg.optim_wrapper.optimizer.lr == rate
    for name, settings in settings_of(model, cfg)[0].items():
        is_stem = name.startswith(('backbone.patch_embed', 'backbone.pos_embed'))
        is_free = model.get_parameter(name).ndim == 1 or name.endswith('.bias')
        assert settings == pytest.approx((factor if is_stem else 1, 0.0 if is_free else decay),
                                         rel=1e-3), name
    # As of the published code, where a norm that is not used remains.
    count = sum(p.numel() for part in (model.backbone, model.neck) for p in part.parameters())
    assert count == (7_556_928 - 192 if is_tiny else 27_500_160 - 384)
    assert model.backbone.features == ('mixer' if is_tiny else 'stream')
    assert model.backbone.out_indices == (5, 11, 17, 23) and model.backbone.cls_token is None
    found = learning_rates(cfg, cfg.train_cfg.max_iters, cfg.train_cfg.max_iters)
    assert len(found) == 60000 and found[0] == pytest.approx(rate * 1e-6)
    assert found[1500] == max(found) == pytest.approx(rate) and found[-1] < rate * 1e-4


@pytest.mark.parametrize('leaf', COCO)
def test_coco(leaf, load, build_meta):
    cfg, model = load(leaf), build_meta(leaf)
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    for name, (factor, decay) in settings_of(model, cfg)[0].items():
        levels = name.split('.')
        depth = 25
        if levels[0] == 'backbone':
            depth = int(levels[2]) + 1 if levels[1] == 'blocks' else 0
        assert factor == pytest.approx(0.837 ** (25 - depth)), name
        assert decay == (0.0 if 'pos_embed' in name else 0.1), name
    found = learning_rates(cfg, cfg.train_cfg.max_iters, cfg.train_cfg.max_iters)
    assert len(found) == 184375 and found[0] == pytest.approx(1e-7)
    assert found[250] == found[163888] == pytest.approx(1e-4)
    assert found[163889] == pytest.approx(1e-5) and found[-1] == pytest.approx(1e-6)
    assert sum(p.numel() for part in (model.backbone, model.neck)
               for p in part.parameters()) == 10_368_112  # as of the published code


# --- a step of training, and a prediction ---------------------------------------------------------

def narrowed(cfg):
    """The model of a config with four blocks of 16 channels, for images of 64 pixels."""
    model = cfg.model
    kind = model.backbone.arch.get('cls_token') if isinstance(model.backbone.arch, dict) \
        else 'middle'
    model.backbone.arch = dict(base='tiny', embed_dims=16, depth=4, image_size=SIZE, cls_token=kind)
    model.backbone.pop('init_cfg', None)
    model.backbone.drop_path_rate = 0.0  # it could leave a block out for both images
    narrow_heads(cfg, [16] * 4)
    if cfg.default_scope == 'mmpretrain':
        model.head.pop('init_cfg', None)
    elif cfg.default_scope == 'mmdet':
        model.data_preprocessor.batch_augments[0].size = (SIZE, SIZE)
    else:
        model.backbone.out_indices = (0, 1, 2, 3)
        model.neck.update(embed_dim=16, norm_cfg=dict(type='BN'))
        model.test_cfg.update(crop_size=(SIZE, SIZE), stride=(43, 43))
    return model


@pytest.mark.parametrize('leaf', [IMAGENET[0], COCO[0], *ADE20K])
def test_one_step_and_a_prediction(leaf, load):
    take_a_step(load(leaf), narrowed)
