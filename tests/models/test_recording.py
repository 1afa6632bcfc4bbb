"""record_scan_inputs gives what a model's scans get, and changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba_mm.layers import record_inputs, record_scan_inputs
from vmamba_mm.models import VMamba
from vmamba_mm.ops import selective_scan
from vmamba_mm.testing import DEVICES, assert_close

ARCH = dict(embed_dims=8, depths=(1, 2, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
            scan='cross')
VANILLA = dict(d_state=16, gate=True, mlp_ratio=0.0)


def make(device='cpu', **kwargs):
    torch.manual_seed(0)
    model = VMamba(**{'arch': ARCH, **kwargs}).to(device).eval()
    return model, torch.randn(2, 3, 40, 56, device=device)


@pytest.mark.parametrize('guard', [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize('arch', [ARCH, ARCH | VANILLA], ids=['plain', 'vanilla'])
@pytest.mark.parametrize('device', DEVICES)
def test_records_what_the_scan_gets(device, arch, guard):
    model, x = make(device, arch=arch)
    chosen = [model.stages[1].blocks[1].ssm, model.stages[3].blocks[0].ssm]
    with torch.no_grad():
        expected = model(x)
    convs = {}
    for module in chosen:
        module.conv2d.register_forward_hook(lambda m, i, y: convs.update({m: y.detach()}))
    with guard(), record_scan_inputs(chosen) as found:
        outs = model(x)
    for out, other in zip(outs, expected, strict=True):
        assert_close(out.detach(), other, 1e-5)
    assert set(found) == set(chosen)
    for module, (x_BDHW, *parameters) in found.items():
        assert_close(x_BDHW, F.silu(convs[module.conv2d]), 1e-6)
        own = (module.x_proj_weight, module.dt_projs_weight, module.dt_projs_bias,
               -module.A_logs.exp(), module.Ds)
        assert all(map(torch.equal, parameters, own))
        assert not any(t.requires_grad for t in (x_BDHW, *parameters))
        assert not module._forward_pre_hooks


def test_watched_blocks_do_not_run_as_one_op(monkeypatch):
    """As they do on NVIDIA GPUs, where no scan would be seen in them."""
    from vmamba_mm.layers import vss_block

    monkeypatch.setattr(vss_block, 'why_not', lambda *args: None)
    monkeypatch.setattr(vss_block, 'runs_kernels', lambda x: True)
    model, _ = make()
    watched, other = model.stages[1].blocks
    x = torch.randn(1, 4, 4, 16)
    assert watched.why_not_one_op(x) is None
    with record_scan_inputs([watched.ssm]):
        assert 'hook' in watched.why_not_one_op(x)
        assert other.why_not_one_op(x) is None
    assert watched.why_not_one_op(x) is None


def test_any_op_by_the_names_of_its_arguments():
    """Of modules that run several ops, the one that was asked for."""
    class Scan(nn.Module):
        def forward(self, u):
            y = selective_scan(u.square(), *inputs[1:])
            return selective_scan(y, *inputs[1:])

    inputs = [torch.rand(1, 2, 5), torch.rand(1, 2, 5), -torch.rand(2, 3),
              torch.rand(1, 1, 3, 5), torch.rand(1, 1, 3, 5)]
    scan = Scan()
    with record_inputs([scan], 'ss2d_scan_fwd', 'selective_scan_fwd') as found:
        assert not found
        scan(inputs[0])
        assert torch.equal(found[scan]['u'], inputs[0].square())
    assert torch.equal(found[scan]['A'], inputs[2])
    with record_inputs([scan], 'ss2d_scan_fwd') as found:
        scan(inputs[0])
    assert not found


@pytest.mark.parametrize('kwargs', [dict(compile=dict(backend='aot_eager')), dict(with_cp=True)],
                         ids=['compiled', 'with_cp'])
def test_other_ways_to_run(kwargs):
    model, x = make(**kwargs)
    module = model.stages[2].blocks[0].ssm
    with torch.no_grad():
        model(x)  # compiled by now
    with record_scan_inputs([module]) as found:
        model(x)[0].sum().backward()
    assert found[module][0].shape == (2, 32, 3, 4)


def test_the_last_run_counts_and_an_error_leaves_no_hook():
    model, x = make()
    module = model.stages[0].blocks[0].ssm
    with torch.no_grad(), record_scan_inputs([module]) as found:
        model(x)
        model(x[:1, :, :24])
    assert found[module][0].shape == (1, 8, 6, 14)
    with pytest.raises(ValueError), record_scan_inputs([module]):
        model(x[:, :2])
    assert not module._forward_pre_hooks and torch._C._len_torch_dispatch_stack() == 0
