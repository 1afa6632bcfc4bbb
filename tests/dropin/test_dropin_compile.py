"""The modules and functions in compiled and exported models, and in saved ones."""

from functools import partial

import pytest
import torch
from s6_by_hand import random

from vmamba_mm.testing import assert_close


@pytest.fixture(params=['none', 'v1', 'v2', 'v3'])
def block(request):
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Block
    from mamba_ssm.ops.triton.layer_norm import RMSNorm
    torch.manual_seed(0)
    mixer = partial(Mamba, d_state=4, bimamba_type=request.param, nslices=2)
    return Block(16, mixer, RMSNorm, fused_add_norm=True, residual_in_fp32=True)


def test_a_block_is_one_graph(block):
    x, residual = (random(2, 8, 16, seed=i, dtype=torch.float32) for i in (0, 1))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    y, total = compiled(x, residual)
    expected = block(x, residual)
    assert_close(y.detach(), expected[0].detach(), 1e-6)
    assert_close(total, expected[1], 1e-6)
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    exported = torch.export.export(block.eval(), (x, residual)).module()
    assert_close(exported(x, residual)[0].detach(), expected[0].detach(), 1e-6)


def test_a_saved_model_loads_without_the_dropin(block, dropin, tmp_path):
    torch.save(block, tmp_path / 'model.pth')
    dropin.uninstall()
    x = random(1, 4, 16, dtype=torch.float32)
    assert torch.equal(torch.load(tmp_path / 'model.pth', weights_only=False)(x)[0], block(x)[0])
