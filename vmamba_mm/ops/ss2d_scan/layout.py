"""Maps (B, D, H, W) of any strides, as the CUDA kernels and matrix products take them."""

import torch
from torch import Tensor


def strides(x_BDHW: Tensor) -> tuple[int, int, int]:
    """The strides of images, pixels and channels of a map that :func:`pixels` gave."""
    stride_b, stride_d, stride_h, stride_w = x_BDHW.stride()
    stride_b = stride_b if x_BDHW.shape[0] > 1 else 0
    return stride_b, stride_w if x_BDHW.shape[3] > 1 else stride_h, stride_d


def pixels(x_BDHW: Tensor) -> Tensor:
    """``x_BDHW`` as it is, unless rows of pixels have gaps between them, or an image or the way to
    the next one goes beyond the kernels' 32-bit offsets: then a copy, channels last."""
    _, _, height, width = x_BDHW.shape
    _, _, stride_h, stride_w = x_BDHW.stride()
    gaps = height > 1 and width > 1 and stride_h != width * stride_w
    stride_b, stride_pixel, _ = strides(x_BDHW)
    if gaps or max(stride_b, height * width * stride_pixel) >= 2**31:
        return x_BDHW.contiguous(memory_format=torch.channels_last)
    return x_BDHW


def _flat(x_BDHW: Tensor) -> Tensor | None:
    """(B*H*W, D) as a view, or None."""
    batch, dim, height, width = x_BDHW.shape
    stride_b, stride_pixel, stride_d = strides(x_BDHW)
    length = height * width
    if (stride_d == 1 or dim == 1) and (batch == 1 or stride_b == length * stride_pixel):
        return x_BDHW.as_strided((batch * length, dim), (stride_pixel, 1))
    return None


def project(x_BDHW: Tensor, weight_PD: Tensor) -> Tensor:
    """(B*H*W, P): each pixel of a map that :func:`pixels` gave, times ``weight_PD``; one product,
    channels-first maps included."""
    if (flat := _flat(x_BDHW)) is not None:
        return torch.mm(flat, weight_PD.T)
    weight_BDP = weight_PD.T.expand(len(x_BDHW), -1, -1)
    return torch.bmm(x_BDHW.flatten(2).transpose(1, 2), weight_BDP).flatten(0, 1)


def project_weight_grad(grad_MP: Tensor, x_BDHW: Tensor) -> Tensor:
    """(P, D): the gradient of :func:`project` by its weight, in the dtype of ``x_BDHW``."""
    if (flat := _flat(x_BDHW)) is not None:
        return torch.mm(grad_MP.T, flat)
    grad_BLP = grad_MP.unflatten(0, (len(x_BDHW), -1))
    return torch.bmm(grad_BLP.transpose(1, 2), x_BDHW.flatten(2).transpose(1, 2)).sum(0)


def like(y_BDHW: Tensor, x_BDHW: Tensor) -> Tensor:
    """``y_BDHW`` with the strides that ``empty_like(x_BDHW)`` has."""
    if y_BDHW.stride() == x_BDHW.stride():
        return y_BDHW
    strides = torch.empty_like(x_BDHW, device='meta').stride()
    if y_BDHW.stride() == strides:
        return y_BDHW
    return y_BDHW.new_empty_strided(y_BDHW.shape, strides).copy_(y_BDHW)
