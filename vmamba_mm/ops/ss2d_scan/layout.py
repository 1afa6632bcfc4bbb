"""Maps as matrices of pixels, without a copy where the strides allow it, for the CUDA kernels."""

import torch
from torch import Tensor


def pixels(x_BDHW: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H*W, D): a view, unless rows of pixels have gaps between them, or an
    image goes beyond the kernels' 32-bit offsets."""
    _, _, height, width = x_BDHW.shape
    _, _, stride_h, stride_w = x_BDHW.stride()
    gaps = height > 1 and width > 1 and stride_h != width * stride_w
    if gaps or height * width * (stride_w if width > 1 else stride_h) >= 2**31:
        x_BDHW = x_BDHW.contiguous(memory_format=torch.channels_last)
    return x_BDHW.flatten(2).transpose(1, 2)


def _flat(x_BLD: Tensor) -> Tensor | None:
    """(B*L, D) as a view, or None."""
    batch, length, dim = x_BLD.shape
    stride_b, stride_pixel, stride_d = x_BLD.stride()
    if (stride_d == 1 or dim == 1) and (batch == 1 or stride_b == length * stride_pixel):
        return x_BLD.as_strided((batch * length, dim), (stride_pixel, 1))
    return None


def project(x_BLD: Tensor, weight_PD: Tensor) -> Tensor:
    """(B*L, P): each pixel times ``weight_PD``; one product, channels-first maps included."""
    if (flat := _flat(x_BLD)) is not None:
        return torch.mm(flat, weight_PD.T)
    return torch.bmm(x_BLD, weight_PD.T.expand(len(x_BLD), -1, -1)).flatten(0, 1)


def project_weight_grad(grad_MP: Tensor, x_BLD: Tensor) -> Tensor:
    """(P, D): the gradient of :func:`project` by its weight, in the dtype of ``x_BLD``."""
    if (flat := _flat(x_BLD)) is not None:
        return torch.mm(grad_MP.T, flat)
    grad_BLP = grad_MP.unflatten(0, x_BLD.shape[:2])
    return torch.bmm(grad_BLP.transpose(1, 2), x_BLD).sum(0)


def like(y_BHWD: Tensor, x_BDHW: Tensor) -> Tensor:
    """``y_BHWD`` as (B, D, H, W) with the strides that ``empty_like(x_BDHW)`` has."""
    y = y_BHWD.permute(0, 3, 1, 2)
    if y.stride() == x_BDHW.stride():
        return y
    strides = torch.empty_like(x_BDHW, device='meta').stride()
    return y if y.stride() == strides else y.new_empty_strided(y.shape, strides).copy_(y)
