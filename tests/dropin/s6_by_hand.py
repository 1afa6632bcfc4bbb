"""The functions that other repositories import, position by position in plain PyTorch: what these
tests hold the dropin to. It shares no code with the package."""

import torch
import torch.nn.functional as F


def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(result, last state) of ``selective_scan_fn``."""
    channels, length = u.shape[1:]
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta

    def at(t, position):  # (D, N), (B, N, L) or (B, G, N, L) -> (B or 1, D, N) at one position
        if t.dim() == 2:
            return t[None]
        t = t[..., position]
        return t[:, None] if t.dim() == 2 else t.repeat_interleave(channels // t.shape[1], 1)

    state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(length):
        state = (delta[:, :, t, None] * A).exp() * state \
            + delta[:, :, t, None] * u[:, :, t, None] * at(B, t)
        outputs.append((state * at(C, t)).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + u * D[:, None]
    return (y if z is None else y * F.silu(z)), state


def conv(x, weight, bias=None, silu=True):
    """``causal_conv1d_fn``."""
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if silu else y


def mix(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias):
    """``mamba_inner_fn_no_out_proj``: (B, 2*D, L) to (B, D, L)."""
    x, z = xz.chunk(2, 1)
    x = conv(x, conv_weight[:, 0], conv_bias)
    dt, B, C = (x_proj @ x).split([dt_proj.shape[1], A.shape[1], A.shape[1]], 1)
    return scan(x, dt_proj @ dt, A, B, C, D, z, dt_bias, True)[0]


def gradients(function, tensors):
    """(result, gradients by those that are not None), of a fixed random gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    rng = torch.Generator().manual_seed(1)
    grad = torch.randn(result.shape, generator=rng, dtype=torch.float64).to(result)
    return result.detach(), torch.autograd.grad(result, [t for t in leaves if t is not None], grad)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
                       ).to(dtype)


def on(device, tensors):
    """The tensors on a device, in fp32 on a GPU: its kernels know no fp64."""
    dtype = torch.float64 if device == 'cpu' else torch.float32
    return [None if t is None else t.to(device, dtype) for t in tensors]


def tolerance(device):
    """How far a result may be from that of fp64."""
    return 1e-9 if device == 'cpu' else 1e-4
