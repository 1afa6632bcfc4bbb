"""The published recipe of DiS: its schedule, and steps and a test of small ones."""

import copy

import numpy as np
import pytest
import torch
from leaves import LEAVES
from small_recipes import learning_rates, settings_of
from torch import nn

pytest.importorskip('diffusers', reason='needs vmamba_mm[diffusion]')

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/dis/')]
CELEBA = next(leaf for leaf in ALL if 'celeba' in leaf)
SMALL = dict(embed_dims=8, depth=2, d_state=2)


@pytest.mark.parametrize('leaf', ALL)
def test_recipe(leaf, load, build_meta):
    cfg, model = load(leaf), build_meta(leaf)
    settings, wrapper = settings_of(model, cfg)
    assert set(settings.values()) == {(1.0, 0.0)}
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    assert wrapper.optimizer.defaults['betas'] == (0.9, 0.999)
    assert cfg.optim_wrapper.clip_grad.max_norm == 1.0
    rates = learning_rates(cfg, 2, 2000)
    assert rates[0] < 1e-6 and max(rates) == pytest.approx(1e-4) == pytest.approx(rates[10], 1e-3)
    middle = 1e-6 + (1e-4 - 1e-6) / 2
    assert rates[10 + 995] == pytest.approx(middle, rel=1e-2)
    assert rates[-1] == pytest.approx(1e-6, rel=1e-2)
    assert cfg.train_cfg.max_epochs == 1000 and cfg.train_dataloader.batch_size * 8 == 128
    assert [h.momentum for h in cfg.custom_hooks] == [1e-4]
    assert model.test_cfg['num_steps'] == 250 and model.class_dropout == 0.1
    assert model.backbone.drop_path.drop_prob == 0.1
    assert bool(model.vae) == ('in1k' in leaf) == bool(model.backbone.num_classes)
    size = [t.size for t in cfg.train_dataloader.dataset.pipeline if 'size' in t]
    assert size in ([], [model.backbone.arch['image_size'] * (8 if model.vae else 1)])


@pytest.mark.parametrize('leaf', [ALL[0], CELEBA])
def test_steps_and_a_test(leaf, load):
    from mmengine.registry import MODELS
    from mmpretrain.structures import DataSample

    cfg = copy.deepcopy(load(leaf).model)
    arch = cfg.backbone.arch if isinstance(cfg.backbone.arch, dict) else dict(
        base=cfg.backbone.arch)
    cfg.backbone.arch = dict(arch, **SMALL, image_size=8, in_channels=3)
    cfg.vae, cfg.test_cfg.num_steps = None, 2
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    _, wrapper = settings_of(model, load(leaf))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}

    def batch():
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        return dict(inputs=list(images), data_samples=[
            DataSample().set_gt_label(i) for i in (3, 7, 999, 0)])

    for _ in range(2):  # the second moves what lies behind zeros too
        assert all(v.isfinite() for v in model.train_step(batch(), wrapper).values())
    assert not [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    data = batch()
    with torch.no_grad():
        found = model.eval().test_step(copy.deepcopy(data))
    for sample, own in zip(found, data['inputs'], strict=True):
        assert sample.pred.shape == (3, 8, 8)
        assert torch.equal(sample.image, own.flip(0) if cfg.data_preprocessor.to_rgb else own)


class Pixels(nn.Module):
    def forward(self, images):
        return images.float()[:, :, ::4, ::4].flatten(1)


def test_a_run_with_averages_and_fid(load, tmp_path):
    """Images in a folder, two epochs, a validation and a test of the averaged weights."""
    from mmengine.runner import Runner
    from PIL import Image

    folder = tmp_path / 'images'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (12, 10 + i, 3), np.uint8)).save(folder / f'{i}.png')
    cfg = load(CELEBA)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.model.backbone.arch.update(SMALL, image_size=8)
    cfg.model.test_cfg.num_steps = 2
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(tmp_path), data_prefix='images')
        loader.dataset.pop('indices', None)
        for transform in loader.dataset.pipeline:
            if transform.type == 'vmamba_mm.HalvingCenterCrop':
                transform.size = 8
    cfg.train_cfg.update(max_epochs=2, val_interval=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.interval = 2
    cfg.val_evaluator = cfg.test_evaluator = dict(
        type='vmamba_mm.FrechetDistance', features=Pixels())
    cfg.log_level = 'WARNING'
    runner = Runner.from_cfg(cfg)
    runner.train()
    saved = torch.load(tmp_path / 'work/epoch_2.pth', weights_only=False)
    assert saved['ema_state_dict']['steps'] == 4
    # What a test takes are the averages, which lie near the first weights.
    raw = {k.removeprefix('module.'): v for k, v in saved['ema_state_dict'].items()}
    name = 'backbone.final_layer.linear.weight'
    assert not torch.equal(saved['state_dict'][name], raw[name])
    assert runner.test()['fid'] > 0
    from vmamba_mm.diffusers import DiS2DModel
    model = DiS2DModel.from_checkpoint(tmp_path / 'work/epoch_2.pth')
    assert torch.equal(model.final_layer.linear.weight, saved['state_dict'][name])
