"""Cobra's configs against the published recipe."""

import pytest

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

LEAVES = sorted((CONFIGS / 'cobra').glob('*.py'))


@pytest.mark.parametrize('leaf', LEAVES, ids=lambda leaf: leaf.stem)
def test_recipe(leaf):
    cfg = cli.load_config(str(leaf))
    is_align, optim = 'align' in leaf.stem, cfg.optim_wrapper
    assert cfg.model.get('stage', 'finetune') == ('align' if is_align else 'finetune')
    rate, decay, batch, epochs = (1e-3, 0, 256, 1) if is_align else (2e-5, 0.1, 128, 2)
    assert (optim.optimizer.type, optim.optimizer.lr, optim.optimizer.weight_decay) == (
        'AdamW', rate, decay)
    assert (optim.type, optim.dtype, optim.clip_grad.max_norm) == (
        'AmpOptimWrapper', 'bfloat16', 1.0)
    assert 8 * cfg.train_dataloader.batch_size == batch == cfg.auto_scale_lr.base_batch_size
    assert cfg.train_cfg.max_epochs == epochs
    rise, fall = cfg.param_scheduler
    assert rise.end == fall.begin == pytest.approx(0.03 * epochs) and fall.end == epochs
    assert cfg.model.language_model.arch == 'mamba-2.8b'
    kinds = {'ldp': 'fused-ldp', 'siglip': 'mlp'}
    kind = next((kinds[key] for key in kinds if key in leaf.stem), 'fused-gelu-mlp')
    assert cfg.model.projector == kind
    assert [tower.image_size for tower in cfg.model.towers] == [384] * (1 if kind == 'mlp' else 2)
