"""The published recipes of VSSD: decay, rates, averages and MESA, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates, narrow_heads, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/vssd/')]
IMAGENET, COCO, ADE20K = ([leaf for leaf in ALL if entry_of(leaf).task == task]
                          for task in ('cls', 'det', 'seg'))
DROP_PATH = dict(micro=0.1, tiny=0.2, small=0.4, base=0.6)
#: of 1024 images
RATES = dict(micro=1e-3, tiny=1e-3, small=6e-4, base=6e-4)
MESA = dict(tiny=1.0, small=1.5, base=2.0)


def test_published_rows():
    assert {(entry_of(leaf).arch, '-mesa' in leaf) for leaf in IMAGENET} == {
        *((arch, False) for arch in RATES), *((arch, True) for arch in MESA)}
    assert {(entry_of(leaf).arch, '3x' in leaf) for leaf in COCO} == {
        (arch, long) for arch in ('micro', 'tiny', 'small') for long in (False, True)}
    assert {entry_of(leaf).arch for leaf in ADE20K} == {'micro', 'tiny'}


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet(leaf, load, build_meta):
    from mmengine.registry import HOOKS
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch]
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.optimizer.lr == RATES[arch]
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.auto_scale_lr.base_batch_size == 1024
    settings, _ = settings_of(model, cfg)
    for name, found in settings.items():
        is_free = model.get_parameter(name).ndim == 1 or name.endswith('.bias')
        assert found == (1.0, 0.0 if is_free else 0.05), name
    for name in ('dt_bias', 'A_log', 'D'):
        assert settings[f'backbone.stages.0.blocks.0.attn.{name}'] == (1.0, 0.0)
    found = learning_rates(cfg, 2, 600)
    assert found[0] == pytest.approx(1e-6)
    assert max(found) == found[39] == pytest.approx(RATES[arch])
    assert found[-1] == pytest.approx(RATES[arch] / 100, rel=1e-2)
    ema, *mesa = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    assert (ema.ema_cfg['momentum'], ema.ema_cfg['update_buffers']) == (1e-4, True)
    if '-mesa' in leaf:
        assert [(hook.value, hook.begin) for hook in mesa] == [(MESA[arch], 0.25)]
        assert cfg.train_cfg.max_epochs * mesa[0].begin == 75
    else:
        assert not mesa


@pytest.mark.parametrize('leaf', COCO + ADE20K)
def test_dense(leaf, load, build_meta):
    """Batch norms have no decay; the rest of the mixer's parameters have it, as published."""
    cfg, arch, model = load(leaf), entry_of(leaf).arch, build_meta(leaf)
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[arch]
    assert cfg.model.backbone.init_cfg.weights == 'model'
    assert not model.backbone.norm_eval
    decay, rate = (0.05, 1e-4) if leaf in COCO else (0.01, 6e-5)
    assert cfg.optim_wrapper.optimizer.lr == rate
    for name, found in settings_of(model, cfg)[0].items():
        assert found == (1.0, 0.0 if 'norm' in name else decay), name
    assert cfg.train_cfg.get('max_epochs') == (None if leaf in ADE20K else
                                               36 if '3x' in leaf else 12)


# --- a step of training, and a prediction ---------------------------------------------------------

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), d_state=4)


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
