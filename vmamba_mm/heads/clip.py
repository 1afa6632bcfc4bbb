"""The visual tower of a CLIP (arXiv 2103.00020): a backbone and a projection of its feature."""

from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import require_equal
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import describe_places
from vmamba_mm.checkpoints.prefixes import drop_wrappers, find_models, inside
from vmamba_mm.errors import UserError
from vmamba_mm.registry import MODELS


class Projection(nn.Module):
    """(B, C) to (B, output_dims), without a bias."""

    def __init__(self, embed_dims: int, output_dims: int):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(embed_dims, output_dims) * embed_dims ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.to(x.dtype)


@MODELS.register_module()
class ClipTower(BaseModule):
    """A backbone and the projection to the space that clips and texts share.

    Parameters are named ``backbone.*`` and ``head.proj``.

    Args:
        backbone: with ``out_type='cls_token'``, such as :class:`vmamba_mm.models.ViViM`, or the
            config of one.
        output_dims: width of the space, such as 512 in CLIP ViT-B/16.
        init_cfg: mmengine's.

    Shape: (B, C, T, H, W) -> (B, output_dims), not normalised.
    """

    def __init__(self, backbone: nn.Module | dict, output_dims: int,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        self.head = Projection(self.backbone.num_features[-1], output_dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1])

    def load_pretrained(self, checkpoint: str, weights: str = 'auto', map_location: Any = 'cpu'
                        ) -> None:
        """Load the tower of a checkpoint, all of it, or raise; a text encoder beside it is ignored.

        Args:
            checkpoint, weights, map_location: as of
                :func:`vmamba_mm.checkpoints.files.read_checkpoint`; an official file has the tower
                under ``visual.``.

        Raises:
            UserError: if the file cannot be read, holds several such towers, or any weight is
                missing, left over or of another shape. The model is then as it was.
        """
        family = self.backbone.family
        content = read_checkpoint(checkpoint, weights, map_location, family=family)
        state = drop_wrappers(content.get('state_dict', content))
        prefixes = [model.prefix for model in find_models(state, family)]
        if len(prefixes) != 1:
            held = f'holds {describe_places(state, family)}' if prefixes else \
                f'holds no {family.model}'
            raise UserError(f'{checkpoint} {held}; one is needed')
        below = inside(state, prefixes[0])
        # Beside a backbone of ours, and below the prefix of an official tower.
        heads = {k: v for k, v in (state if prefixes[0] == 'backbone.' else below).items()
                 if k.startswith('head.')}
        adapted = self.backbone.adapt_weights({k: v for k, v in below.items() if k not in heads})
        found = {f'backbone.{k}': v for k, v in adapted.items()} | heads
        require_equal(self.state_dict(), found, str(checkpoint))
        self.load_state_dict(found)
