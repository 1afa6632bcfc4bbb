"""The fused mixers of mamba_ssm and of Vim's fork: convolution, projections, scan, gate.

Under autocast they calculate as those do, with the input and the three projections in autocast's
dtype and A, D and the bias of dt in fp32.
"""

import torch.nn.functional as F
from torch import Tensor

from vmamba_mm.integrations.dropin.scan import in_groups, refuse_complex
from vmamba_mm.ops import causal_conv, mamba_inner, selective_scan
from vmamba_mm.ops.core.backends import autocast_dtype


def mamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
                   x_proj_weight: Tensor, delta_proj_weight: Tensor, out_proj_weight: Tensor,
                   out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None = None,
                   C: Tensor | None = None, D: Tensor | None = None,
                   delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                   C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
                   checkpoint_lvl: int = 1, b_rms_weight: Tensor | None = None,
                   c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None,
                   b_c_dt_rms_eps: float = 1e-6) -> Tensor:
    """S6 mixer from after in_proj to the end of out_proj.

    Args:
        xz: (B, 2*D, L), x first.
        conv1d_weight: (D, 1, W). conv1d_bias: (D), or None.
        x_proj_weight: (R+2*N, D), for dt, B and C in this order; without the N rows of a given B
            or C.
        delta_proj_weight: (D, R). delta_bias: (D), or None.
        out_proj_weight: (C, D). out_proj_bias: (C), or None.
        A: (D, N), real. D: (D), or None.
        B, C: None for those of x_proj, else as :func:`selective_scan_fn` takes them.
        B_proj_bias, C_proj_bias: (N), added to those of x_proj, or None.
        delta_softplus: softplus of dt, after its bias.
        checkpoint_lvl: has no effect; what the backward recomputes is the op's affair.
        b_rms_weight, c_rms_weight, dt_rms_weight: not covered, None only.

    Returns:
        (B, L, C).
    """
    _refuse_norms(b_rms_weight, c_rms_weight, dt_rms_weight)
    y = mix(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
            delta_bias, B_proj_bias, C_proj_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
                               x_proj_weight: Tensor, delta_proj_weight: Tensor, A: Tensor,
                               B: Tensor | None = None, C: Tensor | None = None,
                               D: Tensor | None = None, delta_bias: Tensor | None = None,
                               B_proj_bias: Tensor | None = None,
                               C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
                               checkpoint_lvl: int = 1) -> Tensor:
    """:func:`mamba_inner_fn` without out_proj: (B, D, L)."""
    return mix(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
               delta_bias, B_proj_bias, C_proj_bias, delta_softplus).transpose(1, 2)


def bimamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
                     x_proj_weight: Tensor, delta_proj_weight: Tensor, out_proj_weight: Tensor,
                     out_proj_bias: Tensor | None, A: Tensor, A_b: Tensor,
                     B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                     delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                     C_proj_bias: Tensor | None = None, delta_softplus: bool = True,
                     checkpoint_lvl: int = 1) -> Tensor:
    """:func:`mamba_inner_fn` in both directions, which share everything but ``A_b``: Vim v1.

    The convolution runs forwards, once. Vim's own backward loses a part of the gradient by z; this
    one does not.
    """
    y = mix(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
            delta_bias, B_proj_bias, C_proj_bias, delta_softplus, A_b)
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
                    out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None,
                    B_proj_bias=None, C_proj_bias=None, delta_softplus=True) -> Tensor:
    """:func:`mamba_inner_fn` of single ops."""
    y = compose(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
                delta_bias, B_proj_bias, C_proj_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight,
                      out_proj_weight, out_proj_bias, A, A_b, B=None, C=None, D=None,
                      delta_bias=None, B_proj_bias=None, C_proj_bias=None,
                      delta_softplus=True) -> Tensor:
    """:func:`bimamba_inner_fn` of single ops."""
    y = compose(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
                delta_bias, B_proj_bias, C_proj_bias, delta_softplus, A_b)
    return F.linear(y, out_proj_weight, out_proj_bias)


def _refuse_norms(*weights: Tensor | None) -> None:
    if any(weight is not None for weight in weights):
        raise NotImplementedError('mamba_inner_fn of vmamba_mm.dropin has no norms of B, C and dt '
                                  '(b_rms_weight, c_rms_weight, dt_rms_weight)')


def cast_for_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype, or as they are without autocast."""
    dtype = autocast_dtype(tensors[0])
    return [t if dtype is None else t.to(dtype) for t in tensors]


def mix(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, delta_softplus, A_b=None) -> Tensor:
    """What is between in_proj and out_proj, (B, 2*D, L) to (B, L, D), by the fused op where it has
    what is asked for; with ``A_b`` also backwards, as in Vim's v1."""
    refuse_complex(A)
    optional = (B, C, B_proj_bias, C_proj_bias, A_b)
    if not delta_softplus or D is None or delta_bias is None or any(
            t is not None for t in optional):
        return compose(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C,
                       D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, A_b)
    xz, x_proj, dt_proj = cast_for_autocast(xz.transpose(1, 2), x_proj_weight, delta_proj_weight)
    return mamba_inner(xz, conv1d_weight[None, :, 0],
                       None if conv1d_bias is None else conv1d_bias[None], x_proj[None],
                       dt_proj[None], delta_bias[None], A[None], D[None])


def compose(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
            delta_bias, B_proj_bias, C_proj_bias, delta_softplus, A_b=None) -> Tensor:
    """:func:`mix` of single ops."""
    refuse_complex(A)
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    xz, x_proj, dt_proj = cast_for_autocast(xz, x_proj_weight, delta_proj_weight)
    x, z = xz.transpose(1, 2).chunk(2, -1)
    x = causal_conv(x, conv1d_weight[:, 0], conv1d_bias)
    projected = F.linear(x, x_proj)

    def choose(given, part, bias):
        if given is not None:
            return given
        return (part if bias is None else part + bias.to(part.dtype)).transpose(1, 2)

    # The rows of B come after those of dt, and those of C are the last; x_proj has those that
    # are used.
    dt = projected[..., :rank]
    B = choose(B, projected[..., rank:rank + state], B_proj_bias)
    C = choose(C, projected[..., -state:], C_proj_bias)
    u, delta, z = x.transpose(1, 2), F.linear(dt, dt_proj).transpose(1, 2), z.transpose(1, 2)
    B, C = in_groups(B, C, u)
    options = dict(z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
    y = selective_scan(u, delta, A, B, C, D, **options)
    if A_b is not None:
        y = y + selective_scan(u, delta, A_b, B, C, D, **options, reverse=True)
    return y.transpose(1, 2)
