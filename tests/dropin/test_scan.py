"""selective_scan_fn, and the extensions selective_scan_cuda*, from their signatures."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from s6_by_hand import gradients, on, random, scan, tolerance

from vmamba_mm.testing import DEVICES, assert_close

BATCH, CHANNELS, STATE, LENGTH = 2, 6, 3, 7
#: By the forms that B and C have.
FORMS = {'3d': ((BATCH, STATE, LENGTH),) * 2, 'groups': ((BATCH, 3, STATE, LENGTH),) * 2,
         'constant': ((CHANNELS, STATE),) * 2,
         'constant B': ((CHANNELS, STATE), (BATCH, 2, STATE, LENGTH)),
         'constant C': ((BATCH, STATE, LENGTH), (CHANNELS, STATE))}


def inputs(form='groups', length=LENGTH, absent=()):
    """u, delta, A, B, C, D, z, delta_bias."""
    B, C = ([length if n == LENGTH else n for n in shape] for shape in FORMS[form])
    shapes = dict(u=(BATCH, CHANNELS, length), delta=(BATCH, CHANNELS, length),
                  A=(CHANNELS, STATE), B=B, C=C, D=(CHANNELS,), z=(BATCH, CHANNELS, length),
                  delta_bias=(CHANNELS,))
    tensors = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors['A'] = -tensors['A'].exp()
    return [None if name in absent else t for name, t in tensors.items()]


def assert_same(actual, expected, rtol=1e-10):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a.cpu().double(), b, rtol, str(i))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('absent', [(), ('z',), ('D', 'delta_bias')], ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_selective_scan_fn(form, absent, device):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    tensors = inputs(form, absent=absent)
    expected, grads = gradients(lambda *args: scan(*args, True)[0], tensors)
    y, found = gradients(lambda *args: selective_scan_fn(*args, True), on(device, tensors))
    assert_same([y, *found], [expected, *grads], tolerance(device))


@pytest.mark.parametrize('softplus', [True, False])
def test_last_state_and_reference(softplus):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
    tensors = inputs('3d')
    tensors[1] = tensors[1] if softplus else 0.1 * tensors[1].abs()
    expected = scan(*tensors, softplus)
    for function in (selective_scan_fn, selective_scan_ref):
        assert_same(function(*tensors, delta_softplus=softplus, return_last_state=True), expected)
        assert_close(function(*tensors, delta_softplus=softplus), expected[0], 1e-10)


def test_half_precision_gives_half_precision():
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    tensors = inputs('3d')
    half = [t.float() if i in (2, 5, 7) else t.half() for i, t in enumerate(tensors)]
    y = selective_scan_fn(*half, True)
    assert y.dtype == torch.float16
    assert_close(y, scan(*[t.double() for t in half], True)[0], 2e-3)


@pytest.mark.parametrize('call', [
    lambda u, A, B: importlib.import_module('mamba_ssm').selective_scan_fn(u, u, A, B, B),
    lambda u, A, B: importlib.import_module('selective_scan_cuda').fwd(
        u, u, A, B, B, None, None, None, True)])
def test_complex_states_are_refused(call):
    u, _, A, *_ = inputs('3d')
    with pytest.raises(NotImplementedError, match='takes a real A, got torch.complex128'):
        call(u, A.to(torch.complex128), torch.cat([u[:, :3]] * 2, -1))


# --- selective_scan_cuda --------------------------------------------------------------------------

def states_by_hand(u, delta, A, B, C, D, delta_bias, chunk):
    """x of the extensions: after each chunk the product of exp(delta A) and the state."""
    found = []
    for end in [*range(chunk, u.shape[-1], chunk), u.shape[-1]]:
        _, state = scan(u[..., :end], delta[..., :end], A, B[..., :end], C[..., :end], D, None,
                        delta_bias, True)
        step = F.softplus(delta[..., :end] + delta_bias[:, None]).sum(-1)
        found.append(torch.stack([(step[..., None] * A).exp(), state], -1).flatten(-2))
    return torch.stack(found, 2)


@pytest.mark.parametrize('gate', [True, False])
def test_selective_scan_cuda_fwd(gate, monkeypatch):
    import selective_scan_cuda
    monkeypatch.setattr('vmamba_mm.integrations.dropin.raw_scan.CHUNK', 3)
    u, delta, A, B, C, D, z, delta_bias = inputs()
    out, x, *gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z if gate else None, delta_bias,
                                             True)
    expected, last = scan(u, delta, A, B, C, D, None, delta_bias, True)
    assert_close(out, expected, 1e-10)
    assert x.shape == (BATCH, CHANNELS, 3, 2 * STATE) and x.is_contiguous()
    assert_close(x, states_by_hand(u, delta, A, B, C, D, delta_bias, 3), 1e-10)
    assert_close(x[:, :, -1, 1::2], last, 1e-10)
    assert len(gated) == gate
    if gate:
        assert_close(gated[0], expected * F.silu(z), 1e-10)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('absent', [(), ('z',), ('D', 'delta_bias')], ids=str)
def test_selective_scan_cuda_bwd(absent, device):
    import selective_scan_cuda
    tensors = on(device, inputs(absent=absent))
    u, delta, A, B, C, D, z, delta_bias = tensors
    out, x, *gated = selective_scan_cuda.fwd(*tensors, True)
    dout = random(*out.shape, seed=9)
    leaves = [None if t is None else t.requires_grad_() for t in inputs(absent=absent)]
    present = [i for i, t in enumerate(tensors) if t is not None]
    grads = dict(zip(present, torch.autograd.grad(scan(*leaves, True)[0],
                                                  [leaves[i] for i in present], dout), strict=True))
    dout = dout.to(u)
    dxz = u.new_empty(BATCH, 2 * CHANNELS, LENGTH)
    dz = None if z is None else dxz[:, CHANNELS:]  # callers give a part of a larger tensor
    *found, out_z = selective_scan_cuda.bwd(*tensors, dout, x, None if z is None else out, dz, True,
                                            True)
    order = [0, 1, 2, 3, 4, 5, 7] + ([] if z is None else [6])
    for i, grad in zip(order, found, strict=True):
        if i in grads:
            assert_close(grad.cpu(), grads[i], tolerance(device), str(i))
        else:
            assert grad is None
    if z is None:
        assert out_z is None
    else:
        assert found[-1] is dz
        assert_close(out_z, gated[0], 1e-6)
    assert len(selective_scan_cuda.bwd(*tensors, dout, x, out, None, True, False)) == len(order)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name, extra', [('core', [1]), ('nrow', [1]), ('oflex', [1, True])])
def test_extensions_of_vmamba(name, extra, device):
    module = importlib.import_module(f'selective_scan_cuda_{name}')
    u, delta, A, B, C, D, _, delta_bias = inputs()
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    y = scan(*leaves[:6], None, leaves[6], True)[0]
    dout = random(*y.shape, seed=9)
    grads = torch.autograd.grad(y, leaves, dout)
    moved = on(device, [t.detach() for t in leaves])
    out, x = module.fwd(*moved, True, *extra)
    assert_close(out.cpu(), y.detach(), tolerance(device))
    assert x.shape == (BATCH, CHANNELS, 1, 2 * STATE)
    found = module.bwd(*moved, dout.to(out), x, True, 1)
    assert_same(found, grads, tolerance(device))


def test_oflex_has_its_own_dtype_and_shared_steps():
    import selective_scan_cuda_oflex
    u, delta, A, B, C, D, _, delta_bias = inputs()
    delta, delta_bias = delta[:, ::2].contiguous(), delta_bias[::2].contiguous()
    half = [t.half() if t.dim() > 2 else t.float() for t in (u, delta, A, B, C, D, delta_bias)]
    for out_float in (True, False):
        out, x = selective_scan_cuda_oflex.fwd(*half, True, 1, out_float)
        assert out.dtype == (torch.float32 if out_float else torch.float16)
        assert x.dtype == torch.float32
    dout = random(*u.shape, seed=9)
    found = selective_scan_cuda_oflex.bwd(u, delta, A, B, C, D, delta_bias, dout, None, True, 1)
    leaves = [t.clone().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    u, delta, A, B, C, D, delta_bias = leaves
    y = scan(u, delta.repeat_interleave(2, 1), A, B, C, D, None, delta_bias.repeat_interleave(2),
             True)[0]
    assert_same(found, torch.autograd.grad(y, leaves, dout))
    half_grads = selective_scan_cuda_oflex.bwd(*half, dout.float(), x, True, 1)
    assert [g.dtype for g in half_grads] == [t.dtype for t in half]


# --- one step -------------------------------------------------------------------------------------

@pytest.mark.parametrize('heads', [False, True])
@pytest.mark.parametrize('rows', [False, True])
def test_selective_state_update(heads, rows):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    tensors = inputs()
    expected, last = scan(*tensors, True)
    u, delta, A, B, C, D, z, delta_bias = tensors

    def shape(t, dim=1):  # of 6 channels, 3 heads of 2
        return t.unflatten(dim, (3, 2)) if heads else t

    state = torch.zeros(BATCH + 2, *shape(last).shape[1:], dtype=u.dtype)
    index = torch.tensor([3, 0]) if rows else None
    used = state if rows else state[:BATCH]
    for t in range(LENGTH):
        y = selective_state_update(
            used, shape(u[..., t]), shape(delta[..., t]), shape(A, 0), B[..., t], C[..., t],
            shape(D, 0), shape(z[..., t]), shape(delta_bias, 0), True, index)
        assert_close(y, shape(expected[..., t]), 1e-10)
    assert_close(state[[3, 0]] if rows else state[:BATCH], shape(last), 1e-10)
