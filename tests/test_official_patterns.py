"""Checkpoints in the official format, run by each scan pattern, against loops over positions; and
the scan of one's own that docs/scans.md shows."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import S1, S2, dense_state, random_backbone
from scan_by_hand import scan_by_hand

from vmamba_mm.models import VMamba
from vmamba_mm.ops import scan_patterns
from vmamba_mm.ops.ss2d_scan import patterns
from vmamba_mm.testing import assert_close

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'scans.md'
ARCHS = {'s1': S1, 's2': dict(S2, d_state=3)}


def ss2d_by_hand(x_BHWC, weights, scan):
    """From the file's own tensors, in fp64; gradients by autograd."""
    u = (x_BHWC @ weights['in_proj.weight'].T).permute(0, 3, 1, 2)
    u = F.silu(F.conv2d(u, weights['conv2d.weight'], padding=1, groups=u.shape[1]))
    y = scan_by_hand(u, weights['x_proj_weight'], weights['dt_projs_weight'],
                     weights['dt_projs_bias'], -weights['A_logs'].exp(), weights['Ds'],
                     weights['out_norm.weight'], weights['out_norm.bias'], 1e-5, scan)
    return y.permute(0, 2, 3, 1) @ weights['out_proj.weight'].T


def check_blocks(model, image, scan, official=None):
    """The result of every SS2D in fp64, and its gradients by input and weights.

    Args:
        official: tensors of the file that the model was loaded from; None for the model's own.

    Returns:
        The number of blocks.
    """
    calls = {}

    def record(name):
        def hook(module, args, y):
            calls[name] = (module, args[0].detach().requires_grad_(), y)
        return hook

    for i, stage in enumerate(model.double().stages):
        for j, block in enumerate(stage.blocks):
            block.ssm.register_forward_hook(record(f'layers.{i}.blocks.{j}.op.'))
    model(image.double())
    for name, (ssm, x, y) in calls.items():
        own = dict(ssm.named_parameters())
        tensors = own if official is None else {k: official[f'backbone.{name}{k}'] for k in own}
        weights = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
        expected = ss2d_by_hand(x, weights, scan)
        assert_close(y, expected, 1e-12, name)
        assert_close(copy.deepcopy(ssm).float()(x.float()), expected, 1e-5, f'{name} in fp32')
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        grads = torch.autograd.grad(ssm(x), [x, *own.values()], grad)
        exact = torch.autograd.grad(expected, [x, *weights.values()], grad)
        for key, one, other in zip(['x', *own], grads, exact, strict=True):
            assert_close(one, other, 1e-11, f'{name} gradient by {key}')
    return len(calls)


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('scan', ['cross', 'unidirectional', 'bidirectional', 'cascade'])
def test_official_checkpoint(tmp_path, scan, arch):
    official = dense_state(random_backbone(ARCHS[arch]))
    torch.save({'model': official}, tmp_path / 'official.pth')
    model = VMamba(dict(ARCHS[arch], scan=scan))
    model.load_pretrained(str(tmp_path / 'official.pth'))
    assert not any('scan' in key for key in model.state_dict())
    image = torch.randn(2, 3, 36, 27, generator=torch.Generator().manual_seed(2))
    assert check_blocks(model, image, scan, official) == 5


def test_documented_scan_of_ones_own(monkeypatch):
    """The example of the page, as it stands there."""
    monkeypatch.setattr(patterns, '_PATTERNS', dict(patterns._PATTERNS))
    monkeypatch.setattr(patterns, '_ORDERS', dict(patterns._ORDERS))
    example = re.search(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)[1]
    names = {}
    exec(example, names)
    assert 'diagonal' in scan_patterns()
    assert [tuple(m.shape) for m in names['maps']] == [
        (1, 96 * 2 ** i, 16 // 2 ** i, 24 // 2 ** i) for i in range(4)]
    model = VMamba(dict(S1, scan='diagonal'))
    assert check_blocks(model, torch.randn(1, 3, 20, 27), 'diagonal') == 5
