"""The op ``evaluate_batch_norm``: the batch norm of inference, a residual sum and ReLU in one
pass."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.batch_norm import cuda, reference


def _why_not(x, mean, variance, weight, bias, residual, relu, eps) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile fuses it with what is around it'
    tensors = mean, variance, weight, bias, residual
    if wants_grad(x, *tensors):
        return 'a gradient is wanted, and the kernel has none'
    return cuda.why_not(x, *tensors)


_evaluate_batch_norm = define_op(
    'evaluate_batch_norm',
    '(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, '
    'Tensor? residual, bool relu, float eps) -> Tensor',
    reference=reference.evaluate_batch_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
    implementations={'cuda': Implementation(cuda.forward, why_not=_why_not)})


def evaluate_batch_norm(x_BHWD: Tensor, mean: Tensor, variance: Tensor, weight: Tensor,
                        bias: Tensor, eps: float = 1e-5, *,
                        residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """The batch norm by statistics that are given, plus ``residual``, and ReLU of it.

    On an NVIDIA GPU one launch where no gradient is wanted, in fp32 and rounded once.

    Args:
        x_BHWD: (B, H, W, D), of any strides, best with the channels next to one another.
        mean, variance: (D), of the batches seen in training.
        weight, bias: (D).
        eps: added to the variance.
        residual: (B, H, W, D), or None for 0.
        relu: whether the result is cut off below 0.

    Returns:
        (B, H, W, D) in the dtype of ``x_BHWD``.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x, ones, zeros = torch.tensor([[[[-1., 2.]]]]), torch.ones(2), torch.zeros(2)
        >>> evaluate_batch_norm(x, zeros, ones, ones, zeros, 0.0, residual=x, relu=True)
        tensor([[[[0., 4.]]]])
    """
    for name, tensor, shape in (
            ('mean', mean, x_BHWD.shape[-1:]), ('variance', variance, x_BHWD.shape[-1:]),
            ('weight', weight, x_BHWD.shape[-1:]), ('bias', bias, x_BHWD.shape[-1:]),
            ('residual', residual, x_BHWD.shape)):
        if x_BHWD.dim() != 4 or tensor is not None and tensor.shape != shape:
            raise ValueError(f'evaluate_batch_norm expects x (B, H, W, D) and {name} of shape '
                             f'{tuple(shape)}; got x {tuple(x_BHWD.shape)}'
                             + ('' if tensor is None else f', {name} {tuple(tensor.shape)}'))
    return _evaluate_batch_norm(x_BHWD, mean, variance, weight, bias, residual, relu, eps)
