"""The op ``linear_relu``: Linear and ReLU on the last dimension, as one product."""

from math import prod

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.linear_relu import cuda, reference

_linear_relu = define_op(
    'linear_relu', '(Tensor x, Tensor weight, Tensor bias) -> (Tensor y)',
    reference=reference.linear_relu,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    implementations={'cuda': Implementation(cuda.forward, cuda.backward, cuda.why_not,
                                            saves=True)},
    saves='x y weight bias',
    flops=lambda x, weight, **_: 2 * prod(x[:-1]) * prod(weight))


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(linear(x, weight, bias))``.

    On an NVIDIA GPU one product, which adds the bias and applies ReLU before it writes; for its
    backward it keeps the input and the result. torch.compile and other devices have PyTorch's own
    ops.

    Args:
        x: (..., C).
        weight: (C', C).
        bias: (C').

    Returns:
        (..., C') in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> linear_relu(torch.tensor([[1., 2.]]), torch.eye(2), torch.tensor([-3., 0.]))
        tensor([[0., 2.]])
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError("linear_relu expects x (..., C), weight (C', C) and bias (C'); got x "
                         f'{tuple(x.shape)}, weight {tuple(weight.shape)}, bias '
                         f'{tuple(bias.shape)}')
    return _linear_relu(x, weight, bias)
