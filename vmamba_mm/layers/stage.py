"""A stage of a backbone: blocks at one resolution, and the downsampling after them."""

from collections.abc import Sequence

from torch import Tensor, nn


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling that follows them (None in the last stage).

    Args of ``forward``:
        x: (B, H, W, C).
        downsample: False to stop before the downsampling.
        with_map: also return the map before the downsampling.

    Shape: (B, H, W, C) -> (B, H', W', 2C); (B, H, W, C) without a downsampling. With ``with_map``
    that, and (B, H, W, C).
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, downsample: bool = True, with_map: bool = False
                ) -> Tensor | tuple[Tensor, Tensor]:
        stage_map = self._run_blocks(x)
        if downsample and self.downsample is not None:
            result = self.downsample(stage_map)
        else:
            result = stage_map
        return (result, stage_map) if with_map else result

    def _run_blocks(self, x: Tensor) -> Tensor:
        return self.blocks(x)
