"""The extensions ``selective_scan_cuda`` (mamba_ssm) and ``selective_scan_cuda_core``, ``_nrow``
and ``_oflex`` (VMamba), which forks call past their Python interfaces.

Nothing here has a gradient of its own: the callers are ``torch.autograd.Function`` of theirs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.integrations.dropin.scan import in_groups, refuse_complex
from vmamba_mm.ops import selective_scan
from vmamba_mm.ops.core.backends import compute_dtype

#: The extensions keep the state after every chunk of so many positions.
CHUNK = 2048


@torch.no_grad()
def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool) -> list[Tensor]:
    """``selective_scan_cuda.fwd``: the arguments are those of ``selective_scan_fn``.

    Returns:
        The result without the gate (B, D, L), x (B, D, ceil(L/2048), 2*N), and with ``z`` the
        gated result. x[..., 1::2] are the states after each chunk, x[..., 0::2] the products of
        exp(delta A) up to there.
    """
    y, x = _run(u, delta, A, B, C, D, delta_bias, delta_softplus, compute_dtype(u.dtype))
    if z is None:
        return [y.to(u.dtype), x]
    return [y.to(u.dtype), x, (y * F.silu(z.to(y.dtype))).to(u.dtype)]


def bwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        z: Tensor | None, delta_bias: Tensor | None, dout: Tensor, x: Tensor | None,
        out: Tensor | None, dz: Tensor | None, delta_softplus: bool, recompute_out_z: bool
        ) -> list[Tensor | None]:
    """``selective_scan_cuda.bwd``, from the gradient ``dout`` by the (gated) result.

    Args:
        x, out: what the forward returned; ``x`` is not needed here.
        dz: a tensor that the gradient by ``z`` is written to, or None.

    Returns:
        The gradients by u, delta, A, B, C, D, delta_bias (None for what is absent), with ``z`` that
        by z, and with ``recompute_out_z`` the gated result.
    """
    grads = _gradients(dout, u, delta, A, B, C, D, delta_bias, z, delta_softplus)
    *results, z_grad = grads
    if z is not None:
        results.append(z_grad if dz is None else dz.copy_(z_grad))
    if recompute_out_z:
        results.append(None if z is None else
                       (out.to(A.dtype) * F.silu(z.to(A.dtype))).to(out.dtype))
    return results


@torch.no_grad()
def core_fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             delta_bias: Tensor | None, delta_softplus: bool, nrows: int = 1) -> list[Tensor]:
    """``selective_scan_cuda_core.fwd`` and ``_nrow.fwd``: B and C are (B, G, N, L), ``nrows`` has
    no effect. Returns the result in the dtype of ``u``, and x as :func:`fwd` does."""
    return [*_run(u, delta, A, B, C, D, delta_bias, delta_softplus, u.dtype)]


@torch.no_grad()
def oflex_fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
              delta_bias: Tensor | None, delta_softplus: bool, nrows: int, out_float: bool
              ) -> list[Tensor]:
    """``selective_scan_cuda_oflex.fwd``: the result in fp32 with ``out_float``. ``delta`` and its
    bias may have fewer channels than ``u``, each for as many neighbouring ones."""
    dtype = compute_dtype(u.dtype) if out_float else u.dtype
    return [*_run(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype)]


def core_bwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
             delta_bias: Tensor | None, dout: Tensor, x: Tensor | None, delta_softplus: bool,
             nrows: int = 1) -> list[Tensor | None]:
    """``bwd`` of ``selective_scan_cuda_core``, ``_nrow`` and ``_oflex``; as :func:`bwd`."""
    return _gradients(dout, u, delta, A, B, C, D, delta_bias, None, delta_softplus)[:-1]


def _run(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype) -> tuple[Tensor, Tensor]:
    """The scan in chunks: the result without a gate, and x."""
    refuse_complex(A)
    delta, delta_bias = _spread(delta, delta_bias, u)
    B, C = in_groups(B, C, u)
    results, states, state = [], [], None
    for start in range(0, u.shape[-1], CHUNK):
        part = slice(start, start + CHUNK)
        y, state = selective_scan(u[..., part], delta[..., part], A, B[..., part], C[..., part], D,
                                  delta_bias=delta_bias, delta_softplus=delta_softplus,
                                  initial_state=state, return_final_state=True, out_dtype=dtype)
        results.append(y)
        states.append(state)
    y = results[0] if len(results) == 1 else torch.cat(results, -1)
    step = delta.to(A.dtype)
    step = step if delta_bias is None else step + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    time = torch.stack([part.sum(-1) for part in step.split(CHUNK, -1)], -1).cumsum(-1)
    products = torch.exp(time[..., None] * A[:, None])
    return y, torch.stack([products, torch.stack(states, 2).to(A.dtype)], -1).flatten(-2)


def _gradients(dout, u, delta, A, B, C, D, delta_bias, z, delta_softplus) -> list[Tensor | None]:
    """The gradients by u, delta, A, B, C, D, delta_bias and z, each in its tensor's dtype."""
    refuse_complex(A)
    tensors = [None if t is None else t.detach().requires_grad_()
               for t in (u, delta, A, B, C, D, delta_bias, z)]
    # The forward runs once more, for autograd alone to record it: a quarter to a third of the time.
    # The states in x would not spare it. They are CHUNK positions apart, and the op's backward,
    # which needs nothing of the forward, finds those that enter its own, much shorter tiles.
    with torch.enable_grad():
        u, delta, A, B, C, D, delta_bias, z = tensors
        delta, delta_bias = _spread(delta, delta_bias, u)
        B, C = in_groups(B, C, u)
        y = selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias,
                           delta_softplus=delta_softplus, out_dtype=dout.dtype)
        found = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], dout))
    return [None if t is None else next(found) for t in tensors]


def _spread(delta: Tensor, delta_bias: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """dt and its bias with as many channels as ``u``."""
    repeats = u.shape[1] // delta.shape[1]
    if repeats == 1:
        return delta, delta_bias
    return (delta.repeat_interleave(repeats, 1),
            None if delta_bias is None else delta_bias.repeat_interleave(repeats, 0))
