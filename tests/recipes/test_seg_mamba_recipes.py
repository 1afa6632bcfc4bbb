"""The published recipe of SegMamba: its optimizer, and a step of a small one with a test."""

import copy

import pytest
import torch
from mmengine.structures import BaseDataElement
from small_recipes import learning_rates, settings_of
from specs import SPECS

SMALL = SPECS['seg_mamba'].first
LEAF = 'configs/seg_mamba/segmamba_1xb2-1000e_brats2023-128x128x128.py'


def test_recipe(load, build_meta):
    cfg, model = load(LEAF), build_meta(LEAF)
    settings, wrapper = settings_of(model, cfg)
    assert set(settings.values()) == {(1.0, 3e-5)}
    assert wrapper.optimizer.defaults['nesterov'] and wrapper.optimizer.defaults['momentum'] == 0.99
    assert cfg.optim_wrapper.clip_grad.max_norm == 12
    cfg.param_scheduler[0].end = 100
    rates = learning_rates(cfg, 1, 100)
    assert rates[0] == pytest.approx(1e-2)
    assert rates[50] == pytest.approx(1e-2 * 0.5 ** 0.9, rel=2e-2)  # of 99 steps
    assert cfg.max_iters == 1000 * 250 and cfg.train_dataloader.batch_size == 2
    assert [len(files) for files in (cfg.brats.images, cfg.regions)] == [4, 3]
    assert model.test_cfg['patch_size'] == (128, 128, 128)
    assert model.test_cfg['mirror_axes'] == (0, 1, 2)


def test_a_step_and_a_test(load):
    from mmengine.registry import MODELS

    cfg = load(LEAF)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.arch = dict(SMALL)
    model_cfg.decode_head.update(in_channels=SMALL['embed_dims'], hidden_dims=12)
    model_cfg.test_cfg.patch_size, model_cfg.test_cfg.mirror_axes = (32, 32, 16), (0, 2)
    torch.manual_seed(0)
    model = MODELS.build(model_cfg)
    _, wrapper = settings_of(model, cfg)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    batch = dict(inputs=[torch.randn(4, 32, 16, 16) for _ in range(2)], data_samples=[
        BaseDataElement(label=torch.randint(4, (1, 32, 16, 16))) for _ in range(2)])
    assert all(value.isfinite() for value in model.train_step(batch, wrapper).values())
    # Before an instance norm, the bias of a convolution has no effect.
    still = {k for k, p in model.named_parameters() if torch.equal(p, before[k])}
    assert all('gsc.proj' in k and k.endswith('bias') for k in still)
    volume = torch.randn(4, 40, 20, 12)  # more than the window, and less
    with torch.no_grad():
        sample, = model.eval().test_step(dict(inputs=[volume], data_samples=[
            BaseDataElement(metainfo=dict(case='b'))]))
    assert sample.case == 'b' and sample.pred.shape == volume.shape[1:]
    assert set(sample.pred.unique().tolist()) <= {0, 1, 2, 3}
