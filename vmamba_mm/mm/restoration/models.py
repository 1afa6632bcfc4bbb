"""The model of restoration for mmengine's Runner, around a network from image to image."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.restoration.tiles import TILE, restore_in_poses, restore_in_tiles, restore_padded
from vmamba_mm.registry import MODELS

LOSSES = ('l1', 'charbonnier')
#: Of Charbonnier's loss, sqrt(d^2 + eps): in BasicSR, and so as published, eps is not squared.
_EPS = 1e-3


@MODELS.register_module()
class PairPreprocessor(BaseDataPreprocessor):
    """Puts images on the device, those of a batch as one tensor."""

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: ``inputs``, a list of (C, H, W) or (B, C, H, W), and ``data_samples``.

        Returns:
            ``inputs`` (B, C, H, W) and ``data_samples``.

        Raises:
            UserError: if the images of a batch are of several sizes.
        """
        data = self.cast_data(data)
        inputs = data['inputs']
        if not isinstance(inputs, Tensor):
            if len({image.shape for image in inputs}) > 1:
                sizes = ', '.join(f'{v.shape[2]}x{v.shape[1]}' for v in inputs)
                raise UserError(f'the images of a batch must be of one size, got {sizes}: cut '
                                'patches, or take a batch_size of 1')
            inputs = torch.stack(list(inputs))
        return dict(inputs=inputs, data_samples=data.get('data_samples'))


@MODELS.register_module()
class ImageRestorer(BaseModel):
    """A network that restores images, with its loss and its way of testing.

    Args:
        backbone: from (B, C, H, W) of [0, 1] to (B, C, s * H, s * W), such as
            :class:`vmamba_mm.models.MambaIR`.
        loss: 'l1', or 'charbonnier', the mean of sqrt(d^2 + 1e-3).
        test_cfg: ``tile``, from which side on an image is restored in tiles (200, as published; 0
            for never), and ``self_ensemble``, whether the result is the mean of eight poses (no).
        data_preprocessor: config of a :class:`PairPreprocessor`, its type by default.
        init_cfg: mmengine's.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    def __init__(self, backbone: dict | nn.Module, loss: str = 'l1',
                 test_cfg: Mapping[str, Any] | None = None, data_preprocessor: dict | None = None,
                 init_cfg: dict | list[dict] | None = None):
        if loss not in LOSSES:
            raise ValueError(f'loss={loss!r} does not exist; choose one of {LOSSES}')
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = MODELS.build(
                dict(type='vmamba_mm.PairPreprocessor') | (data_preprocessor or {}))
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        self.loss_name = loss
        self.test_cfg = _check_test_cfg(test_cfg or {})

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, C, H, W).
            data_samples: of :class:`vmamba_mm.mm.restoration.transforms.PackPair`, with ``gt``.
            mode: 'tensor' for the network's result, 'loss' for a dict of losses, 'predict' for the
                samples with ``pred``, (C, s * H, s * W), clipped to [0, 1].
        """
        if mode == 'tensor':
            return self.backbone(inputs)
        if mode == 'loss':
            targets = torch.stack([sample.gt for sample in data_samples])
            return dict(loss=self._loss(self(inputs).float(), targets))
        if mode == 'predict':
            samples = data_samples or [BaseDataElement() for _ in inputs]
            for sample, image in zip(samples, self.restore(inputs), strict=True):
                sample.pred = image
            return samples
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def _loss(self, y, targets):
        if self.loss_name == 'l1':
            return F.l1_loss(y, targets)
        return ((y - targets).square() + _EPS).sqrt().mean()

    @torch.no_grad()
    def restore(self, inputs: Tensor, progress: Callable[[int, int], Any] | None = None) -> Tensor:
        """Images of any size, as ``test_cfg`` has it, clipped to [0, 1].

        Args:
            inputs: (B, C, H, W) of [0, 1].
            progress: called with the number of tiles that are done, and of all.
        """
        scale, multiple = self.backbone.scale, self.backbone.size_multiple

        def network(x):
            return restore_padded(self.backbone, x, scale, multiple)

        def in_poses(x):
            return restore_in_poses(network, x) if self.test_cfg['self_ensemble'] else network(x)

        y = restore_in_tiles(in_poses, inputs, scale, self.test_cfg['tile'], progress)
        return y.float().clamp(0, 1)


def _check_test_cfg(given: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {**dict(tile=TILE, self_ensemble=False), **given}
    unknown = sorted(set(cfg) - {'tile', 'self_ensemble'})
    if unknown:
        raise ValueError(f'test_cfg has unknown keys {unknown}; its keys are tile, self_ensemble')
    if isinstance(cfg['tile'], bool) or not isinstance(cfg['tile'], int) or cfg['tile'] < 0:
        raise ValueError(f"test_cfg['tile'] must be an int of at least 0, got {cfg['tile']!r}")
    if not isinstance(cfg['self_ensemble'], bool):
        raise ValueError("test_cfg['self_ensemble'] must be True or False, got "
                         f'{cfg["self_ensemble"]!r}')
    return cfg
