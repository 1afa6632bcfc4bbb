"""Images of any size through a network of image restoration: padded, in tiles, in eight poses."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

#: Sides from which on the public code cuts an image into tiles, and their overlap by their side.
TILE = 200
OVERLAP = 10


def restore_padded(network: Callable[[Tensor], Tensor], x: Tensor, scale: int = 1,
                   multiple: int = 1) -> Tensor:
    """The restored image, from one whose sides were brought to multiples by mirroring.

    Args:
        network: from (B, C, H, W) to (B, C, scale * H, scale * W).
        x: (B, C, H, W).
        scale: of the network.
        multiple: what the network's sides must be multiples of.
    """
    height, width = x.shape[2:]
    y = network(_mirror(x, -height % multiple, -width % multiple))
    return y[..., :height * scale, :width * scale]


def _mirror(x, below, right):
    """Mirrored without the border pixel; an image too small for that is mirrored several times."""
    for dim, added in ((2, below), (3, right)):
        while added:
            # An image of a single pixel has nothing but its border.
            step = min(added, x.shape[dim] - 1)
            sides = (0, step or added)
            padding = (*sides, 0, 0) if dim == 3 else (0, 0, *sides)
            x = F.pad(x, padding, 'reflect' if step else 'replicate')
            added -= step or added
    return x


def tile_bounds(length: int, count: int) -> list[tuple[int, int, int, int]]:
    """For each tile of a side (start and end that are kept, start and end with the overlap).

    Args:
        length: of the side, a multiple of ``count``.
        count: of tiles.
    """
    size = length // count
    overlap = size // OVERLAP
    return [(i * size, (i + 1) * size, max(0, i * size - overlap),
             min(length, (i + 1) * size + overlap)) for i in range(count)]


def restore_in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, scale: int = 1,
                     tile: int = TILE, progress: Callable[[int, int], Any] | None = None
                     ) -> Tensor:
    """The restored image, made in tiles as the public code of MambaIR tests.

    A side of n * ``tile`` pixels or more has n + 1 tiles of equal size, of an image that is
    mirrored at its lower and right border if they do not fit. A tile is restored with a tenth of
    its side more from its neighbours, which is cut off.

    Args:
        network: from (B, C, H, W) to (B, C, scale * H, scale * W), any H and W.
        x: (B, C, H, W).
        scale: of the network.
        tile: published numbers have 200; 0 for the whole image at once.
        progress: called with the number of tiles that are done, and of all.

    Returns:
        (B, C, scale * H, scale * W), on the CPU if there are several tiles.

    Raises:
        ValueError: on a negative ``tile``.
    """
    if tile < 0:
        raise ValueError(f'tile must be at least 1, or 0 for the whole image, got {tile}')
    height, width = x.shape[2:]
    rows, columns = (1, 1) if not tile else (height // tile + 1, width // tile + 1)
    if rows * columns == 1:
        y = network(x)
        if progress is not None:
            progress(1, 1)
        return y
    x = _mirror(x, -height % rows, -width % columns)
    out, done = None, 0
    for top, bottom, first_row, last_row in tile_bounds(x.shape[2], rows):
        for left, right, first, last in tile_bounds(x.shape[3], columns):
            y = network(x[..., first_row:last_row, first:last]).cpu()
            if out is None:
                out = y.new_empty(*y.shape[:2], scale * x.shape[2], scale * x.shape[3])
            out[..., scale * top:scale * bottom, scale * left:scale * right] = y[
                ..., scale * (top - first_row):scale * (bottom - first_row),
                scale * (left - first):scale * (right - first)]
            done += 1
            if progress is not None:
                progress(done, rows * columns)
    return out[..., :scale * height, :scale * width]


def restore_in_poses(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of the restored images of eight poses, flipped and transposed, and turned back.

    It is the self-ensemble of published numbers with a plus.

    Args:
        network: from (B, C, H, W) to (B, C, scale * H, scale * W), any H and W.
        x: (B, C, H, W).
    """
    total: Any = 0
    for transposed in (False, True):
        for flips in ((), (-1,), (-2,), (-1, -2)):
            posed = x.transpose(-1, -2) if transposed else x
            y = network(posed.flip(flips)).flip(flips)
            total = total + (y.transpose(-1, -2) if transposed else y)
    return total / 8
