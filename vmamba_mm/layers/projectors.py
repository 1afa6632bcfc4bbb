"""From features of a vision model to the vectors that a language model reads."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ('linear', 'mlp', 'fused-gelu-mlp', 'ldp', 'fused-ldp')


class Projector(nn.Module):
    """The projectors of Cobra (arXiv 2403.14520, section 3.1), with the names of its files.

    - ``linear``: one layer.
    - ``mlp``: two, with GELU between, of ``out_dims`` channels.
    - ``fused-gelu-mlp``: three, for the features of two towers side by side; the first has
      4 ``in_dims`` channels.
    - ``ldp`` and ``fused-ldp``: the first two layers of those, then four tokens of the square map
      become about one (average pooling to ``side``), and a depthwise convolution is added to them
      (the lightweight downsampling of MobileVLM V2, arXiv 2402.03766, section 3.3).

    Args:
        in_dims: channels of the features.
        out_dims: C, channels of the language model.
        kind: one of the above.
        side: of the map of tokens after ``ldp``; the published 14 make 196 tokens of 729.

    Shape: (B, N, in_dims) -> (B, M, out_dims), where M is N, or after ``ldp`` the square of
    ``side``.

    Raises:
        ValueError: on another ``kind``; with ``ldp`` also if N is no square.
    """

    def __init__(self, in_dims: int, out_dims: int, kind: str = 'fused-gelu-mlp', side: int = 14):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'kind={kind!r} does not exist; choose one of {KINDS}')
        if kind == 'linear':
            self.projector = nn.Linear(in_dims, out_dims)
            return
        hidden = 4 * in_dims if kind.startswith('fused') else out_dims
        layers = [nn.Linear(in_dims, hidden), nn.GELU(), nn.Linear(hidden, out_dims)]
        if kind == 'fused-gelu-mlp':
            layers += [nn.GELU(), nn.Linear(out_dims, out_dims)]
        elif kind.endswith('ldp'):
            layers += [_Pool(side), _Peg(out_dims)]
        self.projector = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)


def _to_map(x: Tensor) -> Tensor:
    """(B, N, C) to (B, C, sqrt(N), sqrt(N))."""
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f'the projector ldp takes a square of tokens, got {x.shape[1]}')
    return x.transpose(1, 2).unflatten(2, (side, side))


class _Pool(nn.Module):
    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(_to_map(x), self.side).flatten(2).transpose(1, 2)


class _Peg(nn.Module):
    """Positions by a convolution (arXiv 2102.10882)."""

    def __init__(self, dims: int):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(dims, dims, 3, padding=1, groups=dims))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.peg(_to_map(x)).flatten(2).transpose(1, 2)
