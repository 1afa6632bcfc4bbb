"""What VMamba alone has; tests/test_backbones.py has what it shares with every backbone."""

import pytest
import torch
from torch import nn

from vmamba_mm.models import VMamba

S1 = dict(embed_dims=8, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv', scan='cross')
VANILLA = dict(S1, d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0,
               stem='patch', downsample='merge')
SCANS = ('unidirectional', 'bidirectional', 'cascade')
OTHER = dict(S1, d_state=2, act='relu', conv_kernel=0, gate=True, ssm_init='zero')
ARCHS = [pytest.param(S1, id='s1'), pytest.param(VANILLA, id='vanilla')]


def test_state_space_parameters_have_the_published_shapes():
    with torch.device('meta'):
        ssm = VMamba('vanilla_tiny').stages[0].blocks[0].ssm
    shapes = {name: tuple(p.shape) for name, p in ssm.named_parameters(recurse=False)}
    assert shapes == dict(x_proj_weight=(4, 6 + 32, 192), dt_projs_weight=(4, 192, 6),
                          dt_projs_bias=(4, 192), A_logs=(768, 16), Ds=(768,))


@pytest.mark.parametrize('arch', ARCHS)
def test_initialisation(arch):
    torch.manual_seed(0)
    model = VMamba(arch)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.abs().max() < 0.12 and 0.01 < module.weight.std() < 0.03
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    ssm = model.stages[0].blocks[0].ssm
    assert (ssm.Ds == 1).all() and not ssm.A_logs[:, 0].any()


def test_optional_keys_reach_every_block():
    """Absent, they are what is published; the names of the parameters do not change."""
    published = dict(act='silu', conv_kernel=3, ssm_init='mamba')
    torch.manual_seed(0)
    plain = VMamba(S1).state_dict()
    torch.manual_seed(0)
    spelled_out = VMamba(dict(S1, **published)).state_dict()
    assert list(plain) == list(spelled_out)
    assert all(torch.equal(value, spelled_out[key]) for key, value in plain.items())

    model = VMamba(dict(OTHER, gate=False))
    for stage in model.stages:
        for block in stage.blocks:
            assert block.ssm.act == 'relu' and block.ssm.conv2d is None
            assert not block.ssm.A_logs.any()
    assert set(plain) - set(model.state_dict()) == {k for k in plain if 'conv2d' in k}
    model = VMamba(dict(S1, conv_kernel=7))
    assert model.stages[3].blocks[0].ssm.conv2d.weight.shape == (64, 1, 7, 7)


@pytest.mark.parametrize('scan', SCANS)
def test_scan_reaches_every_block_and_leaves_no_trace(scan):
    torch.manual_seed(0)
    plain = VMamba(S1)
    torch.manual_seed(0)
    model = VMamba(dict(S1, scan=scan))
    assert all(b.ssm.scan == scan for stage in model.stages for b in stage.blocks)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 31, 44)
    outs = model(x)
    assert not any(torch.allclose(one, other) for one, other in zip(outs, plain(x), strict=True))
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('stem', ['conv', 'patch'])
@pytest.mark.parametrize(('images', 'in_channels'), [(1, 3), (4, 3), (3, 4)])
def test_images_of_other_channels(stem, images, in_channels):
    model = VMamba(dict(S1, stem=stem), in_channels=in_channels).eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(
                ValueError, match=f'to have {in_channels} channels, but got {images}.*in_channels'):
            model(torch.randn(1, images, 16, 16))
