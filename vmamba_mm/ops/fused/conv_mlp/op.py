"""The op ``conv_mlp``: Linear, GELU, a depthwise convolution that is added, and Linear."""

from math import prod

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.conv_mlp import cuda, reference


def _fake(x, w1, b1, conv_weight, conv_bias, w2, b2, save):
    hidden = *x.shape[:-1], w1.shape[0]
    return (x.new_empty((*x.shape[:-1], w2.shape[0])),
            x.new_empty((prod(hidden[:-1]), hidden[-1]) if save else (0,)),
            x.new_empty(hidden if save else (0,)))


_conv_mlp = define_op(
    'conv_mlp',
    '(Tensor x, Tensor w1, Tensor b1, Tensor conv_weight, Tensor conv_bias, Tensor w2, Tensor b2, '
    'bool save) -> (Tensor y, Tensor inner, Tensor mixed)',
    reference=reference.conv_mlp,
    fake=_fake,
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not,
                                            saves=True)},
    saves='x w1 b1 conv_weight conv_bias w2 b2 inner mixed',
    flops=lambda x, w1, w2, **_: 2 * prod(x[:-1]) * (prod(w1) + prod(w2) + 9 * w1[0]))


def conv_mlp(x: Tensor, w1: Tensor, b1: Tensor, conv_weight: Tensor, conv_bias: Tensor, w2: Tensor,
             b2: Tensor) -> Tensor:
    """Linear and GELU, a depthwise 3x3 convolution that is added to its input, and Linear (RMT,
    arXiv 2309.11523).

    On an NVIDIA GPU its backward keeps what GELU and the last product take, and calculates GELU
    again; torch.compile and other devices have PyTorch's own ops.

    Args:
        x: (B, H, W, C).
        w1, b1: (D, C), (D).
        conv_weight, conv_bias: (D, 1, 3, 3), (D).
        w2, b2: (C', D), (C').

    Returns:
        (B, H, W, C') in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x, w1, w2 = torch.randn(2, 5, 3, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> weight, zeros = torch.randn(32, 1, 3, 3), torch.zeros(32)
        >>> conv_mlp(x, w1, zeros, weight, zeros, w2, torch.zeros(8)).shape
        torch.Size([2, 5, 3, 8])
    """
    inner, outer = w1.shape[:1], w2.shape[:1]
    if x.dim() != 4 or w1.shape[1:] != x.shape[-1:] or b1.shape != inner \
            or conv_weight.shape != (*inner, 1, 3, 3) or conv_bias.shape != inner \
            or w2.shape[1:] != inner or b2.shape != outer:
        shapes = [tuple(t.shape) for t in (x, w1, b1, conv_weight, conv_bias, w2, b2)]
        raise ValueError('conv_mlp expects x (B, H, W, C), w1 (D, C), b1 (D), conv_weight '
                         f"(D, 1, 3, 3), conv_bias (D), w2 (C', D) and b2 (C'); got {shapes}")
    return _conv_mlp(x, w1, b1, conv_weight, conv_bias, w2, b2)
