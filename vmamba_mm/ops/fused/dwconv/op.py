"""The ops ``dwconv_silu`` and ``dwconv_add``: depthwise 3x3 convolutions of channels-last maps,
with bias and SiLU, or with bias and the map itself."""

from math import prod

from torch import Tensor

from vmamba_mm.ops.core.define_op import Implementation, define_op
from vmamba_mm.ops.fused.add_norm import add_norm
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
    _check('dwconv_silu', x_BHWD, weight, bias)
    return _dwconv_silu(x_BHWD, weight, bias)


def _check(name: str, x_BHWD: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dim = x_BHWD.shape[3] if x_BHWD.dim() == 4 else -1
    if weight.shape != (dim, 1, 3, 3) or bias is not None and bias.shape != (dim,):
        raise ValueError(f'{name} expects x (B, H, W, D), weight (D, 1, 3, 3) and bias (D) or '
                         f'None; got x {tuple(x_BHWD.shape)}, weight {tuple(weight.shape)}'
                         + ('' if bias is None else f', bias {tuple(bias.shape)}'))


def _add_bwd_fake(grad, x, weight, bias, branch, scale):
    def like(t):
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(x), like(weight), like(bias), like(branch)


_dwconv_add = define_op(
    'dwconv_add',
    '(Tensor x, Tensor weight, Tensor? bias, Tensor? branch, Tensor? scale) -> Tensor',
    reference=reference.dwconv_add,
    fake=lambda x, *_: x.new_empty(x.shape),
    implementations={'cuda': Implementation(cuda.forward_add, cuda.backward_add,
                                            cuda.why_not_add)},
    saves='x weight bias branch scale',
    no_grad='scale',
    backward_fake=_add_bwd_fake,
    flops=lambda x, **_: 2 * 9 * prod(x))


def dwconv_add(x_BHWD: Tensor, weight: Tensor, bias: Tensor | None = None,
               branch: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
    """A map and its depthwise 3x3 convolution, padded with zeros: convolutional position encoding
    (arXiv 2102.10882), with the residual sum before it.

    ``t + conv(t) + bias`` of ``t = x + scale * branch``. On an NVIDIA GPU one kernel, in fp32 from
    the inputs to the result; for its backward it keeps the inputs only. Elsewhere PyTorch's own
    convolution, with autocast.

    Args:
        x_BHWD: (B, H, W, D), any H and W; of any strides, best with the channels next to one
            another.
        weight: (D, 1, 3, 3).
        bias: (D), or None.
        branch: (B, H, W, D), or None for 0.
        scale: (B), the factor of the branch, which has no gradient; None for 1.

    Returns:
        (B, H, W, D) without gaps, in the dtype of ``x_BHWD``.

    Raises:
        ValueError: if the shapes do not fit one another.

    Example:
        >>> x = torch.ones(1, 2, 2, 4)
        >>> dwconv_add(x, torch.ones(4, 1, 3, 3), branch=x).flatten()[:4]
        tensor([10., 10., 10., 10.])
    """
    _check('dwconv_add', x_BHWD, weight, bias)
    if branch is not None and branch.shape != x_BHWD.shape \
            or scale is not None and scale.shape != x_BHWD.shape[:1]:
        raise ValueError(
            f'dwconv_add expects branch (B, H, W, D) or None and scale (B) or None beside x '
            f'{tuple(x_BHWD.shape)}; got branch {None if branch is None else tuple(branch.shape)}, '
            f'scale {None if scale is None else tuple(scale.shape)}')
    if branch is not None and branch.dtype != x_BHWD.dtype:
        x_BHWD, branch, scale = add_norm(x_BHWD, branch, None, None, scale=scale)[0], None, None
    return _dwconv_add(x_BHWD, weight, bias, branch, None if branch is None else scale)
