"""The recipes of Video Mamba Suite: what they set, and that a small model trains and evaluates."""

import copy

import pytest
import torch
from leaves import LEAVES
from small_recipes import make_small, settings_of
from specs import SPECS

from vmamba_mm.mm.cli.runs import build_model

RECIPES = [leaf for leaf in LEAVES if leaf.startswith('configs/video_mamba_suite/')]
ATTENTION = 'backbone.blocks.0.attn.qkv.weight'


@pytest.mark.parametrize('leaf', RECIPES)
def test_optimizer(leaf, load):
    cfg = make_small(load(leaf))
    found, wrapper = settings_of(build_model(cfg), cfg)
    decay = cfg.optim_wrapper.optimizer.weight_decay
    if 'vivim' in leaf:
        assert (cfg.optim_wrapper.optimizer.lr, decay) == (8e-4, 0.1 if 'tiny' in leaf else 0.05)
        for name in ('backbone.pos_embed', 'backbone.cls_token', 'backbone.patch_embed.proj.bias'):
            assert found.pop(name) == (pytest.approx(0.75 ** 25), 0), name
        assert found.pop('backbone.patch_embed.proj.weight') == (pytest.approx(0.75 ** 25), decay)
        assert found.pop('backbone.temporal_embedding') == (1, 0)
        assert found['backbone.blocks.0.mixer.A_b_log'] == (1, decay)
    else:
        assert isinstance(wrapper.optimizer, torch.optim.SGD)
        assert (cfg.optim_wrapper.optimizer.lr, decay) == (1.2e-2, 5e-4)
        assert found.pop('backbone.pos_embed') == (1, 0)
        assert found['backbone.cls_token'] == found[ATTENTION] == (1, decay)
    model = build_model(cfg)
    assert found == {name: (1, 0 if p.ndim == 1 or name.endswith('.bias') else decay)
                     for name, p in model.named_parameters() if name in found}


@pytest.mark.parametrize('leaf', RECIPES)
def test_a_step_and_an_evaluation(leaf, load):
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    cfg = make_small(load(leaf))
    model = build_model(cfg)
    model.init_weights()
    frames = SPECS[model.backbone.family.name].model.clip_length(model.backbone.arch)
    clips = torch.randint(0, 255, (2, 2, 3, frames, 16, 16), dtype=torch.uint8)
    data = dict(inputs=clips, data_samples=[DataSample().set_gt_label(i) for i in (1, 3)])
    features, = model.train().extract_feat(torch.randn(64, 3, frames, 16, 16))
    assert (features == 0).float().mean() == pytest.approx(0.5 if 'ek100' in leaf else 0, abs=0.05)
    _, wrapper = settings_of(model, cfg)
    before = model.backbone.cls_token.detach().clone()
    loss = model.train_step(copy.deepcopy(data), wrapper)['loss']
    assert loss.isfinite() and not torch.equal(model.backbone.cls_token, before)
    with torch.no_grad():
        first, second = (model.eval().val_step(copy.deepcopy(data)) for _ in range(2))
    for sample, same in zip(first, second, strict=True):
        assert sample.pred_score.shape == (5,) and sample.pred_score.sum() == pytest.approx(1)
        assert torch.equal(sample.pred_score, same.pred_score)


def test_schedules(load):
    for leaf in RECIPES:
        cfg = load(leaf)
        warmup, cosine = cfg.param_scheduler
        epochs = 100 if 'ek100' in leaf else 70 if 'tiny' in leaf else 50
        assert cfg.train_cfg.max_epochs == cosine.end == epochs
        assert warmup.end == cosine.begin == (2 if 'ek100' in leaf else 5)
        lr, base = cfg.optim_wrapper.optimizer.lr, 1.2e-2 / 3e-3 if 'ek100' in leaf else 4
        assert lr * warmup.start_factor == pytest.approx(1e-6 * base)
        last = 1e-5 if 'ek100' in leaf else 1e-6
        assert lr * cosine.eta_min_ratio == pytest.approx(last * base)
        frames = {pipeline[0].num_frames for pipeline in (
            cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline,
            cfg.test_dataloader.dataset.pipeline)}
        assert frames == {16}
        policies = [step for step in str(cfg.train_dataloader.dataset.pipeline).split('{')
                    if 'RandAugment' in step]
        wanted = {'tiny': "'num_policies': 2", 'small': "'num_policies': 4"}
        assert bool(policies) == ('vivim' in leaf)
        assert all(wanted['tiny' if 'tiny' in leaf else 'small'] in step for step in policies)
        assert cfg.model.get('drop_rate', 0) == (0.5 if 'ek100' in leaf else 0)
