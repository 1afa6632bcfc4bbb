"""Frozen vision towers of timm, whose features a language model reads."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from vmamba_mm.checkpoints.files import fetch
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.errors import UserError
from vmamba_mm.registry import MODELS

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@MODELS.register_module()
class VisionTower(BaseModule):
    """A ViT of timm, frozen: the tokens of its second-to-last block, before the last norm.

    Tokens beside those of the image, of the class and registers, are left out. It takes images from
    0 to 1 and normalises them itself, as towers side by side do so in different ways.

    Args:
        name: in timm, such as ``vit_large_patch14_reg4_dinov2.lvd142m``.
        image_size: of the square images. What does not fill a patch at the right and below is not
            seen, such as the last 6 of 384 pixels by patches of 14.
        mean, std: of the normalisation; None for what timm says of the model.
        pretrained: whether :meth:`init_weights` loads (and downloads) the weights that timm has.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads a file with weights of this
            model by timm's names instead, all of them.
        options: more arguments of ``timm.create_model``, such as ``depth``.

    Shape: (B, 3, image_size, image_size) -> (B, N, ``embed_dims``).

    Raises:
        UserError: if timm is not installed, has no such model, or it has no blocks with tokens.
    """

    def __init__(self, name: str, image_size: int = 384,
                 mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 pretrained: bool = False, init_cfg: dict | None = None, **options: Any):
        super().__init__(init_cfg=init_cfg)
        try:
            import timm
        except ImportError as err:
            raise UserError("a vision tower needs timm: pip install '.[vlm]'") from err
        try:
            self.arguments = dict(img_size=image_size, num_classes=0, **options)
            self.name, self.pretrained = name, pretrained
            self.vit = timm.create_model(name, **self.arguments)
        except RuntimeError as err:
            if 'Unknown model' not in str(err):
                raise
            raise UserError(f'timm has no model {name!r}') from err
        if not hasattr(self.vit, 'blocks') or not hasattr(self.vit, 'forward_intermediates') \
                or len(self.vit.blocks) < 2:
            raise UserError(f'{name} of timm has no two blocks of tokens: choose a ViT')
        self.image_size, self.embed_dims = image_size, self.vit.embed_dim
        known = self.vit.pretrained_cfg
        for key, value in (('mean', mean), ('std', std)):
            values = torch.tensor(known[key] if value is None else value).view(3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        self.requires_grad_(False)
        self.eval()

    def init_weights(self) -> None:
        """Load the weights that ``pretrained`` or ``init_cfg`` names; none otherwise.

        Raises:
            UserError: if a file cannot be read or does not fit.
        """
        if self.pretrained:
            import timm

            loaded = timm.create_model(self.name, pretrained=True, **self.arguments)
            self.vit.load_state_dict(loaded.state_dict())
        if not self.init_cfg:
            return
        checkpoint = self.init_cfg['checkpoint']
        content = read_content(fetch(checkpoint))
        state = content.get('state_dict', content)
        try:
            self.vit.load_state_dict(state)
        except RuntimeError as err:
            text = ' '.join(str(err).split())
            raise UserError(f'{checkpoint} does not fit the tower: {text:.300}') from err

    def train(self, mode: bool = True) -> 'VisionTower':
        """Frozen, it stays in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            images = F.interpolate(images, (self.image_size, self.image_size), mode='bicubic',
                                   antialias=True).clamp(0, 1)
        x = (images - self.mean) / self.std
        tokens, = self.vit.forward_intermediates(
            x, indices=[len(self.vit.blocks) - 2], norm=False, output_fmt='NLC', stop_early=True,
            intermediates_only=True)
        return tokens
