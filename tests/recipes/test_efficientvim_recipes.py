"""The published recipes of EfficientViM: decay, rates, averages, MESA, the teacher, and a step."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from leaves import LEAVES, entry_of
from small_recipes import batch_of, learning_rates, settings_of, take_a_step

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/efficientvim/')]
KINDS = ('dist', '300', '450')


def kind_of(leaf):
    return 'dist' if '-dist_' in leaf else '450' if '-450e_' in leaf else '300'


def test_published_rows():
    assert {(entry_of(leaf).arch, kind_of(leaf), entry_of(leaf).tag) for leaf in ALL} == {
        (f'm{i}', kind, 'dist_in1k' if kind == 'dist' else f'e{kind}_in1k')
        for i in range(1, 5) for kind in KINDS}


@pytest.mark.parametrize('leaf', ALL)
def test_recipe(leaf, load, build_meta):
    from mmengine.registry import HOOKS
    cfg, entry, model = load(leaf), entry_of(leaf), build_meta(leaf)
    epochs = entry.metadata['Epochs']
    assert epochs == (450 if kind_of(leaf) == '450' else 300)
    assert cfg.train_cfg.max_epochs == epochs + 10
    assert 'drop_path_rate' not in cfg.model.backbone
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=0.02)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 2048
    norms = {f'backbone.{name}.weight' for name, module in model.backbone.named_modules()
             if type(module).__name__.startswith('LayerNorm')}
    assert len(norms) == sum(model.backbone.depths) + 4
    for name, found in settings_of(model, cfg)[0].items():  # the published norms have (1, C, 1)
        is_free = model.get_parameter(name).ndim == 1 and name not in norms
        assert found == (1.0, 0.0 if is_free else 0.05), name
    found = learning_rates(cfg, 2, 2 * epochs + 20)
    assert found[0] == pytest.approx(2e-6)
    assert max(found) == found[39] == pytest.approx(2e-3)
    assert found[2 * epochs:] == pytest.approx([2e-5] * 20, rel=1e-2)
    ema, *mesa = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    assert (ema.ema_cfg['momentum'], ema.ema_cfg['update_buffers']) == (5e-4, True)
    if kind_of(leaf) == 'dist':
        assert not mesa and model.head.distilled and model.head.alpha == 0.5
        assert timm.is_model_pretrained(model.teacher.model_name)
        assert model.teacher.model_name == 'regnety_160.deit_in1k'
    else:
        assert mesa[0].value == 1.0
        starts = [epoch >= mesa[0].begin * (epochs + 10) for epoch in range(epochs)]
        assert starts.index(True) == epochs // 4


@pytest.mark.parametrize('leaf', ALL)
def test_sizes_of_images(leaf, load):
    size = 256 if entry_of(leaf).arch == 'm4' else 224
    assert entry_of(leaf).metadata.get('Image Size', 224) == size
    cfg = load(leaf)
    crop = cfg.train_dataloader.dataset.pipeline[1]
    assert (crop.type, crop.scale) == ('RandomResizedCrop', size)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        _, resize, crop, _ = loader.dataset.pipeline
        assert (resize.type, resize.scale) == ('ResizeEdge', int(256 / 224 * size))
        assert (crop.type, crop.crop_size) == ('CenterCrop', size)


# --- a step of training, and a prediction ---------------------------------------------------------

ARCH = dict(embed_dims=(8, 12, 16), depths=(1, 1, 1), d_state=(6, 4, 3))


def narrowed(cfg):
    """The model of a config with three blocks, and as small a teacher."""
    model = cfg.model
    model.backbone.arch = dict(ARCH)
    model.head.in_channels = [8, 12, 16, 16]
    if 'teacher' in model:
        model.teacher.update(model_name='efficientvim_m1', pretrained=False, depths=(1, 1, 1),
                             embed_dim=(8, 8, 8), state_dim=(2, 2, 2))
    model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    return model


@pytest.mark.parametrize('kind', KINDS[:2])
def test_one_step_and_a_prediction(kind, load):
    """A has no effect."""
    take_a_step(load(next(leaf for leaf in ALL if kind_of(leaf) == kind)), narrowed, r'mixer\.A$')


def test_mesa_reads_the_logits(load):
    """Of the head, in a step after a quarter of the training."""
    from mmengine.registry import HOOKS, MODELS
    cfg = load(next(leaf for leaf in ALL if kind_of(leaf) == '300'))
    torch.manual_seed(0)
    model = MODELS.build(narrowed(cfg)).train()
    ema, mesa = (HOOKS.build(dict(hook)) for hook in cfg.custom_hooks)
    ema.ema_model = SimpleNamespace(module=copy.deepcopy(model))
    runner = SimpleNamespace(hooks=[ema, mesa], model=model, train_loop=None, iter=3, max_iters=10)
    mesa.before_train(runner)
    mesa.before_train_iter(runner, 0)
    batch = model.data_preprocessor(batch_of('mmpretrain'), training=True)
    losses = model(**batch, mode='loss')
    wanted = ema.ema_model.module(batch['inputs']).softmax(1)
    found = model(batch['inputs'])
    torch.testing.assert_close(losses['loss_mesa'],
                               torch.nn.functional.cross_entropy(found, wanted))
    mesa.after_train(runner)
    assert set(model(**batch, mode='loss')) == {'loss'}
