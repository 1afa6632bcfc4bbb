"""The ops ``squared_relu`` and ``sigmoid_gate``, which RWKV has between its products."""

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.gates import cuda, reference

_squared_relu = define_op(
    'squared_relu', '(Tensor x) -> Tensor',
    reference=reference.squared_relu,
    fake=lambda x: x.new_empty(x.shape),
    implementations={'cuda': Implementation(cuda.squared_relu, cuda.squared_relu_backward,
                                            cuda.why_not)},
    saves='x')

_sigmoid_gate = define_op(
    'sigmoid_gate', '(Tensor x, Tensor other) -> Tensor',
    reference=reference.sigmoid_gate,
    fake=lambda x, other: x.new_empty(x.shape),
    implementations={'cuda': Implementation(cuda.sigmoid_gate, cuda.sigmoid_gate_backward,
                                            cuda.why_not)},
    saves='x other')


def squared_relu(x: Tensor) -> Tensor:
    """``relu(x) ** 2`` (arXiv 2305.13048, equation 18).

    On an NVIDIA GPU one kernel, and so is its backward, for which ``x`` alone is kept.

    Args:
        x: (...).

    Returns:
        (...) in the dtype of ``x``.

    Example:
        >>> squared_relu(torch.tensor([-1., 3.]))
        tensor([0., 9.])
    """
    return _squared_relu(x)


def sigmoid_gate(x: Tensor, other: Tensor) -> Tensor:
    """``sigmoid(x) * other`` (arXiv 2305.13048, equations 14 and 18).

    On an NVIDIA GPU one kernel, and so is its backward, for which the inputs alone are kept.

    Args:
        x, other: (...).

    Returns:
        (...) in the dtype of the product.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> sigmoid_gate(torch.tensor([0., 100.]), torch.tensor([2., 3.]))
        tensor([1., 3.])
    """
    if x.shape != other.shape:
        raise ValueError('sigmoid_gate expects two maps of one shape, got '
                         f'{tuple(x.shape)} and {tuple(other.shape)}')
    return _sigmoid_gate(x, other)
