"""The order of points along a Hilbert curve (J. Skilling, Programming the Hilbert curve, 2004)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

#: Levels of the curve of a fixed depth. Once every three levels the axes have the same roles: the
#: order is that of every depth 1, 4, 7, ... that the cells fit into, thus of depth 7, which clouds
#: in the unit sphere have in cells of 0.02.
FIXED_DEPTH = 19
#: Name -> the axes of a point, in the order in which the curve takes them.
CURVES = {'hilbert': (0, 1, 2), 'hilbert-trans': (1, 0, 2)}
DEPTHS = 'fixed', 'cloud', 'batch'
#: That the automaton of the curve reads at a time.
LEVELS = 3


class Curve(NamedTuple):
    """How a curve goes through the points of clouds."""

    order: Tensor  #: (B, G), the number of the point at each step
    code: Tensor  #: (B, G), where each point lies on the curve
    cells: Tensor  #: (B, G, 3), x, y and z of each point's cell, from 0
    depth: Tensor  #: (B), the levels that the cells are coded in


def hilbert_code(cells: Tensor, depth: int) -> Tensor:
    """The place on a Hilbert curve of cells of a cube of 2^depth cells a side.

    Args:
        cells: (..., 3), int64, from 0 to 2^depth - 1.
        depth: levels, from 1 to 21.

    Returns:
        (...), int64.
    """
    return _hilbert_code(cells, depth)


# One node of a graph, as of farthest_points.
@torch.library.custom_op('vmamba_mm::hilbert_code', mutates_args=())
def _hilbert_code(cells: Tensor, depth: int) -> Tensor:
    spread, digits, following, starts = _tables(cells.device)
    padding = -depth % LEVELS
    shifts = torch.arange(depth + padding - LEVELS, -1, -LEVELS, device=cells.device)
    bits = spread[cells.unsqueeze(-1) >> shifts & 7]
    octants = bits[..., 0, :] << 2 | bits[..., 1, :] << 1 | bits[..., 2, :]
    code = torch.zeros_like(cells[..., 0])
    state = code + starts[padding]
    for step in range(len(shifts)):
        key = state + octants[..., step]
        code = code << 3 * LEVELS | digits[key]
        state = following[key]
    return code


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The curve as an automaton that reads ``LEVELS`` levels at a time.

    A state is how the curve lies in a cube; the octant that a cell is in gives a digit of its code
    and the state there.

    Returns:
        Three bits of an axis -> every third bit of the octants; (state, octants) -> digits of the
        code, and the next state, of which each is a multiple of 8^LEVELS; the states to begin in,
        by the levels that a depth lacks of a multiple of LEVELS: after as many of the octants 0 it
        is the first state.
    """
    digits, following = _automaton()
    many, size = len(digits), 8 ** LEVELS
    octants = torch.arange(size)
    state = torch.arange(many).unsqueeze(1).expand(many, size)
    code = torch.zeros(many, size, dtype=torch.long)
    for level in range(LEVELS - 1, -1, -1):
        octant = (octants >> 3 * level & 7).expand(many, size)
        code = code << 3 | digits[state, octant]
        state = following[state, octant]
    spread = torch.tensor([sum((i >> bit & 1) << 3 * bit for bit in range(3)) for i in range(8)])
    starts = []
    for padding in range(LEVELS):
        reached = torch.arange(many)
        for _ in range(padding):
            reached = following[reached, 0]
        starts.append(int((reached == 0).nonzero()[0]) * size)
    return (spread.to(device), code.flatten().to(device), (state * size).flatten().to(device),
            tuple(starts))


@functools.cache
def _automaton() -> tuple[Tensor, Tensor]:
    """(state, octant) -> digit and next state, both (states, 8), read off Skilling's codes.

    The first state is that of the whole cube. Where two parts of it have the same digits on two
    levels, the curve lies in them alike.
    """
    depth = 21
    two_levels = torch.arange(64)
    axes = [two_levels >> 5 & 1, two_levels >> 4 & 1, two_levels >> 3 & 1,
            two_levels >> 2 & 1, two_levels >> 1 & 1, two_levels & 1]
    below = torch.stack([axes[i] << 1 | axes[i + 3] for i in range(3)], 1)

    def look(path):
        """The digits of the 64 cells two levels below a part, and of its octants."""
        level = depth - len(path)
        corner = torch.tensor([sum((octant >> 2 - axis & 1) << depth - 1 - i
                                   for i, octant in enumerate(path)) for axis in range(3)])
        code = code_by_levels(corner + (below << level - 2), depth)
        found = tuple((code >> 3 * (level - 2) & 63).tolist())
        return found, [digit >> 3 for digit in found[::8]]

    first, row = look(())
    states, paths, digits, following = {first: 0}, [()], [row], []
    for path in paths:  # which grows
        following.append([])
        for octant in range(8):
            found, row = look((*path, octant))
            if found not in states:
                states[found] = len(paths)
                paths.append((*path, octant))
                digits.append(row)
            following[-1].append(states[found])
    return torch.tensor(digits), torch.tensor(following)


def code_by_levels(cells: Tensor, depth: int) -> Tensor:
    """:func:`hilbert_code` level by level, with all axes at once, as Skilling has it."""
    axes = list(cells.unbind(-1))
    for level in range(depth - 1, 0, -1):
        low = (1 << level) - 1
        for i in range(3):
            is_set = (axes[i] >> level) & 1 == 1
            swap = torch.where(is_set, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(is_set, axes[0] ^ low, axes[0] ^ swap)
            if i:
                axes[i] = axes[i] ^ swap
    for i in (1, 2):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[2])
    for level in range(depth - 1, 0, -1):
        flip = torch.where((axes[2] >> level) & 1 == 1, flip ^ ((1 << level) - 1), flip)
    axes = [axis ^ flip for axis in axes]
    code = torch.zeros_like(flip)
    for level in range(depth - 1, -1, -1):
        for axis in axes:
            code = code << 1 | (axis >> level) & 1
    return code


@_hilbert_code.register_fake
def _(cells, depth):
    return cells.new_empty(cells.shape[:-1])


def curve_order(points: Tensor, curve: str = 'hilbert', grid_size: float = 0.02,
                depth: str = 'fixed') -> Curve:
    """The order of the points of each cloud along a Hilbert curve through cells of a grid.

    Cells count from the least one of the cloud on each axis. Points of one cell keep their order.

    Args:
        points: (B, G, 3).
        curve: a key of ``CURVES``: 'hilbert-trans' takes y before x.
        grid_size: the side of a cell. It is absolute: a cloud that is scaled has another order.
        depth: of the curve, which decides how its axes are turned: 'fixed' is the same for all
            clouds; 'cloud' is as deep as the cloud needs; 'batch' as the largest cloud of the batch
            needs, as the public code of PointMamba has it: then the order of a cloud depends on the
            others of its batch. A cell of number 2^19 or more on an axis counts as the last.

    Raises:
        ValueError: on another ``curve`` or ``depth``, with the choices.
    """
    if curve not in CURVES:
        raise ValueError(f'curve={curve!r} does not exist; choose one of {tuple(CURVES)}')
    if depth not in DEPTHS:
        raise ValueError(f'depth={depth!r} does not exist; choose one of {DEPTHS}')
    points = points.detach().float()
    cells = torch.floor(points / grid_size).long()
    cells = (cells - cells.amin(1, keepdim=True)).clamp(0, (1 << FIXED_DEPTH) - 1)
    along = cells[..., CURVES[curve]]
    if depth == 'fixed':
        code = hilbert_code(along, FIXED_DEPTH)
        depths = torch.full_like(cells[:, 0, 0], FIXED_DEPTH)
    else:
        largest = cells.amax((1, 2)) if depth == 'cloud' else cells.amax().expand(len(cells))
        depths = sum((largest >> level > 0).long() for level in range(FIXED_DEPTH))
        # Every three levels the code is the same, so that three of fixed depths are all there are.
        codes = torch.stack([hilbert_code(along, FIXED_DEPTH + more) for more in range(3)])
        which = ((depths - FIXED_DEPTH) % 3).view(1, -1, 1).expand(1, *codes.shape[1:])
        code = codes.gather(0, which).squeeze(0)
    return Curve(code.argsort(dim=1, stable=True), code, cells, depths)
