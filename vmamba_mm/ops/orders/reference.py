"""Cross scan and cross merge in plain PyTorch (VMamba, arXiv 2401.10166, section 4.3).

B batch, D channels, H/W height/width, L = H*W, K directions.
"""

import torch
from torch import Tensor

#: The routes in the order in which every per-direction parameter is stacked; K takes the first K.
ROUTES = ('row-major', 'column-major', 'reversed row-major', 'reversed column-major')


def scan_forward(x_BDHW: Tensor, num_routes: int, channels_last: bool = False) -> Tensor:
    """(B, D, H, W) -> (B, K, D, L): one copy of the map in each route's order.

    With ``channels_last``, (B, H, W, D) -> (B, L, K, D).
    """
    if channels_last:
        return scan_forward(x_BDHW.permute(0, 3, 1, 2), num_routes).permute(0, 3, 1, 2)
    row = x_BDHW.flatten(2)
    column = x_BDHW.transpose(2, 3).flatten(2)
    return torch.stack((row, column, row.flip(-1), column.flip(-1))[:num_routes], dim=1)


def merge_forward(y_BKDL: Tensor, height: int, width: int, channels_last: bool = False) -> Tensor:
    """(B, K, D, L) -> (B, D, H, W): every route turned back into place, and summed.

    With ``channels_last``, (B, L, K, D) -> (B, H, W, D).
    """
    if channels_last:
        return merge_forward(y_BKDL.permute(0, 2, 3, 1), height, width).permute(0, 2, 3, 1)
    batch, num_routes, dim, _ = y_BKDL.shape
    merged = y_BKDL.new_zeros(batch, dim, height, width)
    for k in range(num_routes):
        y = y_BKDL[:, k].flip(-1) if k >= 2 else y_BKDL[:, k]
        if k % 2 == 0:
            merged = merged + y.view(batch, dim, height, width)
        else:
            merged = merged + y.view(batch, dim, width, height).transpose(2, 3)
    return merged
