"""The published recipes of MambaIR and MambaIRv2, and steps of small ones with a test."""

import copy

import pytest
import torch
from leaves import LEAVES
from mmengine.structures import BaseDataElement
from small_recipes import learning_rates, settings_of

FOLDER = 'configs/mambair/'
NAMES = [leaf.removeprefix(FOLDER).removesuffix('.py') for leaf in LEAVES if FOLDER in leaf]
UNET = 'mambair-unet_8xb8-300k_sidd'
#: By what a name begins with: rate, patch of the good image, batch of a GPU, loss, milestones in
#: thousands, seed.
_LONG, _SHORT = (250, 400, 450, 475), (125, 200, 225, 237.5)
_DN, _DN_SHORT = (800, 1200, 1400, 1500), (400, 600, 700, 750)
RECIPES = {
    'mambair-x2': (2e-4, 128, 4, 'l1', _LONG, 10), 'mambair-x3': (1e-4, 192, 8, 'l1', _SHORT, 10),
    'mambair-x4': (1e-4, 192, 4, 'l1', _SHORT, 10),
    **{f'mambair{which}-x{n}': (2e-4, 128 if n == 2 else 192, 16, 'l1', _LONG, 10)
       for which in ('-light', '-light-2024-03', 'v2-light') for n in (2, 3, 4)},
    **{f'mambairv2-{size}-x{n}': (1e-3 if n == 2 else 1e-4, 128 if n == 2 else 192, 4, 'l1',
                                  _LONG if n == 2 else _SHORT, 10)
       for size in ('small', 'base', 'large') for n in (2, 3, 4)},
    **{f'mambair{version}-noise{s}': (2e-4 if s == 15 else 1e-4, 128, 2, 'charbonnier',
                                      _DN if s == 15 else _DN_SHORT, 10)
       for version in ('', 'v2') for s in (15, 25, 50)},
    **{f'mambair{version}-jpeg{q}': (2e-4 if q == 40 else 1e-4, 126, 2, 'charbonnier',
                                     _DN if q == 40 else _DN_SHORT, 42)
       for version in ('', 'v2') for q in (40, 30, 10)}}
#: A small network of each kind, and channels of the image.
SMALL = {
    'mambair-light-x3_2xb16-500k_div2k': dict(base='light_x3', embed_dims=30, depths=(1,),
                                              d_state=1),
    'mambairv2-small-x2_8xb4-500k_df2k': dict(
        base='small_x2', embed_dims=8, depths=(2,), num_heads=(2,), d_state=1, window_size=4,
        inner_rank=2, num_tokens=3),
    'mambair-noise25_8xb2-800k_dfwb': dict(base='denoise', embed_dims=30, depths=(1,), d_state=1),
    'mambairv2-jpeg40_8xb2-1600k_dfwb': dict(
        base='denoise', embed_dims=8, depths=(1,), num_heads=(2,), d_state=1, window_size=4,
        inner_rank=2, num_tokens=3),
    UNET: dict(base='real_denoise', embed_dims=30, depths=(1, 1, 1, 1), refinement_depth=1,
               d_state=1)}


def step_of(cfg, kind, which='train'):
    pipeline = cfg[f'{which}_dataloader'].dataset.pipeline
    return next((step for step in pipeline if step.type == f'vmamba_mm.{kind}'), None)


@pytest.mark.parametrize('name', [name for name in NAMES if name != UNET])
def test_recipe(name, load):
    cfg = load(f'{FOLDER}{name}.py')
    rate, size, batch, loss, milestones, seed = RECIPES[name.partition('_')[0]]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('Adam', rate, 0)
    assert tuple(optimizer.betas) == (0.9, 0.99) and 'clip_grad' not in cfg.optim_wrapper
    schedule, = cfg.param_scheduler
    assert (schedule.type, schedule.gamma, schedule.by_epoch) == ('MultiStepLR', 0.5, False)
    assert schedule.milestones == [1000 * m for m in milestones]
    thousands = int(name.split('_')[1].rpartition('-')[2].removesuffix('k'))
    assert cfg.train_cfg.max_iters == thousands * 1000 and cfg.train_cfg.val_interval == 5000
    assert cfg.train_dataloader.batch_size == batch and cfg.randomness.seed == seed
    gpus = int(name.split('_')[1].partition('x')[0])
    assert cfg.auto_scale_lr.base_batch_size == gpus * batch
    assert step_of(cfg, 'PatchOfPair').size == size and cfg.model.loss == loss
    is_v1 = not name.startswith('mambairv2')
    assert cfg.model.backbone.get('drop_path_rate', 0) == (0.1 if is_v1 else 0)
    scale = step_of(cfg, 'PatchOfPair').get('scale', 1)
    metric = dict(cfg.val_evaluator)
    if scale > 1:
        assert f'x{scale}' in name and step_of(cfg, 'LoadPair', 'val').scale == scale
        assert (metric['crop_border'], metric['on_luma']) == (scale, True)
        names = [*cfg.train_dataloader.dataset.lq, cfg.val_dataloader.dataset.lq]
        assert all(folder.endswith(f'X{scale}') for folder in names)
        assert len(cfg.train_dataloader.dataset.gt) == (2 if 'df2k' in name else 1)
    elif 'noise' in name:
        sigma = int(name.partition('noise')[2].partition('_')[0])
        assert step_of(cfg, 'AddNoise').sigma == step_of(cfg, 'AddNoise', 'test').sigma == sigma
        assert step_of(cfg, 'AddNoise').get('seed') is None
        assert step_of(cfg, 'AddNoise', 'test').seed == 0
    else:
        quality = int(name.partition('jpeg')[2].partition('_')[0])
        assert step_of(cfg, 'CompressJPEG', 'test').quality == quality
        # On whole images, as the files of the authors: its blocks begin anywhere in a patch.
        steps = cfg.train_dataloader.dataset.pipeline
        assert [s.type.removeprefix('vmamba_mm.') for s in steps] == [
            'LoadPair', 'CompressJPEG', 'PatchOfPair', 'TurnPair', 'PackPair']
        assert step_of(cfg, 'CompressJPEG').quality == quality
        assert cfg.model.backbone.in_channels == 1
        assert step_of(cfg, 'LoadPair').colour == 'grey'


def test_recipe_of_real_noise(load):
    cfg = load(f'{FOLDER}{UNET}.py')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 3e-4, 1e-4)
    assert tuple(optimizer.betas) == (0.9, 0.999) and cfg.optim_wrapper.clip_grad.max_norm == 0.01
    progressive, mixed = cfg.custom_hooks
    assert sum(progressive.iters) == cfg.train_cfg.max_iters == 300_000
    assert (mixed.beta, mixed.prob) == (1.2, 0.5)
    assert cfg.model.test_cfg.tile == 0 and cfg.randomness.seed == 100
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 4000
    assert progressive.batch_sizes[0] == cfg.train_dataloader.batch_size
    assert progressive.patch_sizes[-1] == step_of(cfg, 'PatchOfPair').size == 384
    cfg.param_scheduler[0].update(begin=92, end=300)
    rates = learning_rates(cfg, 1, 301)
    assert rates[:92] == [3e-4] * 92 and rates[-1] == pytest.approx(1e-6, rel=2e-2)
    assert rates[92 + 104] == pytest.approx((3e-4 + 1e-6) / 2, rel=2e-2)


@pytest.mark.parametrize('name', SMALL)
def test_a_step_and_a_test(name, load):
    from mmengine.registry import METRICS, MODELS

    cfg = load(f'{FOLDER}{name}.py')
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.arch = dict(SMALL[name])
    torch.manual_seed(0)
    model = MODELS.build(model_cfg)
    settings, wrapper = settings_of(model, cfg)
    assert {value[0] for value in settings.values()} == {1.0}
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    channels, scale = model.backbone.in_channels, model.backbone.scale
    batch = dict(inputs=[torch.rand(channels, 8, 16) for _ in range(2)], data_samples=[
        BaseDataElement(gt=torch.rand(channels, 8 * scale, 16 * scale)) for _ in range(2)])
    for _ in range(2):
        assert model.train_step(copy.deepcopy(batch), wrapper)['loss'].isfinite()
    # A ReLU of a single channel may be off.
    still = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    assert all('.attention.' in k for k in still)
    sample = BaseDataElement(gt=torch.rand(channels, 16 * scale, 20 * scale))
    with torch.no_grad():
        found, = model.eval().test_step(dict(inputs=[torch.rand(channels, 16, 20)],
                                             data_samples=[sample]))
    metric = METRICS.build(cfg.test_evaluator)
    metric.process({}, [found.to_dict()])
    results = metric.compute_metrics(metric.results)
    assert 0 < results['psnr'] < 30 and -1 < results['ssim'] < 1
