"""The op ``causal_conv``: its definition, checks, and the public function."""

from math import prod

import torch
from torch import Tensor

from vmamba_mm.ops.causal_conv import chunked, cuda, reference
from vmamba_mm.ops.core.backends import Backend
from vmamba_mm.ops.core.checks import check_shapes
from vmamba_mm.ops.core.define_op import Implementation, define_op


def _fake(x, weight, bias, initial_state, silu, reverse, return_final_state, backend):
    batch, _, dim = x.shape
    state = (batch, weight.shape[1] - 1, dim) if return_final_state else 0
    return torch.empty_like(x), x.new_empty(state)


def _bwd_fake(grad_y, grad_state, x, *others):
    weight, bias, initial_state = others[:3]
    return chunked.laid_out_like(x, x.new_empty(x.shape)), *(
        x.new_empty(0) if t is None else t.new_empty(t.shape)
        for t in (weight, bias, initial_state))


_causal_conv = define_op(
    'causal_conv_fwd',
    '(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu, bool reverse, '
    'bool return_final_state, str backend) -> (Tensor y, Tensor final_state)',
    reference=reference.forward,
    fake=_fake,
    results=2,
    implementations={
        'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not),
        'chunked': Implementation(chunked.forward, chunked.backward)},
    saves='x weight bias initial_state silu reverse return_final_state',
    backward_fake=_bwd_fake,
    flops=lambda x, weight, **_: 2 * prod(x) * weight[1])


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = True,
                reverse: bool = False, initial_state: Tensor | None = None,
                return_final_state: bool = False, backend: Backend | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
    """The short depthwise convolution in front of a scan (figure 3 of arXiv 2312.00752).

    ``y_t = silu(bias + sum_w weight[:, w] x_(t - W + 1 + w))``: position t reads itself and the
    W - 1 before it. Every tensor has a gradient, which also flows through the states.

    Args:
        x: (B, L, D), of any strides: a channel-first tensor goes in as ``x.transpose(1, 2)``.
        weight: (D, W), the last tap for the position itself. 'reference' and 'chunked' take any W.
        bias: (D), or None.
        silu: whether SiLU follows.
        reverse: mirrored in time: position t reads itself and the W - 1 after it.
        initial_state: (B, W - 1, D), the inputs before the first step, oldest first, or None for
            zeros.
        return_final_state: return the last W - 1 inputs too.
        backend: 'reference', 'chunked' or 'cuda'; None for 'cuda' where an NVIDIA GPU takes the
            inputs, else 'chunked'.

    Returns:
        (B, L, D) in the dtype and, where ``x`` has no gaps, with the strides of ``x``, whatever
        autocast says. It is calculated in fp32 (fp64 for fp64). With ``return_final_state`` a
        tuple of it and the final state (B, W - 1, D) in the dtype of ``x``, oldest first; those
        inputs that came before the first step are in it where L < W - 1. The gradient by ``x`` has
        no gaps; positions are adjacent in it where they are in ``x``, else channels.

    Raises:
        ValueError: on shapes that do not fit one another, or an unknown backend.

    Example:
        >>> x, weight = torch.ones(1, 3, 1), torch.tensor([[1., 2., 4.]])
        >>> causal_conv(x, weight, silu=False).flatten()
        tensor([4., 6., 7.])
        >>> causal_conv(x, weight, silu=False, reverse=True).flatten()
        tensor([7., 6., 4.])
    """
    check(x, weight, bias, initial_state)
    y, state = _causal_conv(x, weight, bias, initial_state, silu, reverse, return_final_state,
                            backend=backend)
    return (y, state) if return_final_state else y


def check(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None) -> None:
    """Raise ValueError unless the shapes fit one another."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError('causal_conv expects x (B, L, D) and weight (D, W); '
                         f'got x {tuple(x.shape)}, weight {tuple(weight.shape)}')
    batch, length, dim = x.shape
    if length < 1:
        raise ValueError(f'causal_conv expects L >= 1, got x {tuple(x.shape)}')
    check_shapes('causal_conv', {'x': x, 'weight': weight}, bias=(bias, (dim,)),
                 initial_state=(initial_state, (batch, weight.shape[1] - 1, dim)))
