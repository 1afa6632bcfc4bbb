"""The visual tower of a CLIP (arXiv 2103.00020): a backbone and a projection of its feature."""

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

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

    Parameters are named ``backbone.*`` and ``head.proj``. The official files that hold both towers
    have them under ``visual.``, as :meth:`load_pretrained` knows.

    Args:
        backbone: with ``out_type='cls_token'``, such as :class:`vmamba_mm.models.ViViM`, or the
            config of one.
        output_dims: of the space, 512 in CLIP ViT-B/16.
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
