"""The op ``dwconv_silu``: depthwise 3x3 convolution with bias and SiLU on a channels-last map."""

from math import prod

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.dwconv import cuda, reference


def _bwd_fake(grad, x, weight, bias):
    return (x.new_empty(x.shape), weight.new_empty(weight.shape),
            weight.new_empty(0 if bias is None else bias.shape,
                             dtype=weight.dtype if bias is None else bias.dtype))


_dwconv_silu = define_op(
    'dwconv_silu', '(Tensor x, Tensor weight, Tensor? bias) -> Tensor',
    reference=reference.dwconv_silu,
    fake=lambda x, weight, bias: x.new_empty(x.shape),
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not)},
    saves='x weight bias',
    backward_fake=_bwd_fake,
    flops=lambda x, **_: 2 * 9 * prod(x))


def dwconv_silu(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """SiLU of a depthwise 3x3 convolution, padded with zeros (SS2D in figure 3 of the paper).

    On an NVIDIA GPU one kernel, in fp32 from the weights as they are to the result; for its
    backward it keeps the inputs only. Elsewhere PyTorch's own convolution, with autocast.

    Args:
        x_BHWD: (B, H, W, D), any H and W; of any strides, best with the channels next to one
            another.
        weight: (D, 1, 3, 3).
        bias: (D), or None.

    Returns:
        (B, H, W, D) without gaps, in the dtype of ``x_BHWD``.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> dwconv_silu(torch.zeros(1, 2, 2, 4), torch.ones(4, 1, 3, 3), torch.zeros(4)).sum()
        tensor(0.)
    """
    dim = x_BHWD.shape[3] if x_BHWD.dim() == 4 else -1
    if weight.shape != (dim, 1, 3, 3) or bias is not None and bias.shape != (dim,):
        raise ValueError('dwconv_silu expects x (B, H, W, D), weight (D, 1, 3, 3) and bias (D) or '
                         f'None; got x {tuple(x_BHWD.shape)}, weight {tuple(weight.shape)}'
                         + ('' if bias is None else f', bias {tuple(bias.shape)}'))
    return _dwconv_silu(x_BHWD, weight, bias)
