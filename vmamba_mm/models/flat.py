"""What the backbones of one long sequence have in common: Vim and those of clips."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vmamba_mm.models.base import Backbone


class FlatBackbone(Backbone):
    """A backbone whose stages are its blocks, all on the same tokens.

    A subclass gives what :class:`Backbone` asks for, its modules as ``patch_embed``, ``blocks`` and
    ``norm`` (of the last block's output), and :meth:`forward_tokens`.

    Args:
        arch: with the keys ``embed_dims`` and ``depth``.
        out_indices: blocks to return; the last by default.
        out_type: one of ``out_types``: 'featmap' for the patches as maps; 'cls_token' for the class
            token; 'raw' for all tokens.
        kwargs: as of :class:`Backbone`.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
        TypeError: on a keyword of another backbone, left over in a merged config.
    """

    #: What ``out_type`` may be.
    out_types: tuple[str, ...] = ('featmap', 'cls_token')
    stages_name = 'blocks'
    is_flat = True
    returns_last = True
    norms_last = True

    def __init__(self, arch: str | Mapping[str, Any] | None = None,
                 out_indices: Sequence[int] | None = None, out_type: str = 'featmap', **kwargs):
        if out_type not in self.out_types:
            few = len(self.out_types) == 2
            raise ValueError(f'out_type={out_type!r} does not exist; choose ' + (
                ' or '.join(map(repr, self.out_types)) if few else f'one of {self.out_types}'))
        self.out_type = out_type
        super().__init__(arch, out_indices, **kwargs)

    @staticmethod
    def stage_sizes(arch: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
        return (1,) * arch['depth'], [arch['embed_dims']] * arch['depth']

    def output_norm(self, i: int) -> nn.Module | None:
        return self.norm if i == len(self.depths) - 1 else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x) if self.out_type == 'featmap' else self.forward_tokens(x)

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs if ``out_type`` asks for tokens, after their norms, of what the backbone
        takes."""
        raise NotImplementedError
