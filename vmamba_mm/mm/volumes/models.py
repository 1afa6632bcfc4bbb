"""The segmentor of volumes for mmengine's Runner, around a backbone and a decoder of volumes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require
from vmamba_mm.registry import MODELS

LOSSES = 'ce', 'dice_ce'


@MODELS.register_module()
class VolumePreprocessor(BaseDataPreprocessor):
    """Puts patches and volumes on the device. Patches of a batch are of one size."""

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: ``inputs``, a list of (C, D, H, W) or (B, C, D, H, W), and ``data_samples``.

        Returns:
            ``inputs`` (B, C, D, H, W) and ``data_samples``.

        Raises:
            UserError: if the volumes of a batch are of several sizes.
        """
        data = self.cast_data(data)
        inputs = data['inputs']
        if not isinstance(inputs, Tensor):
            if len({volume.shape for volume in inputs}) > 1:
                sizes = ', '.join('x'.join(map(str, v.shape[1:])) for v in inputs)
                raise UserError(f'the volumes of a batch must be of one size, got {sizes}: cut '
                                'patches, or take a batch_size of 1')
            inputs = torch.stack(list(inputs))
        return dict(inputs=inputs, data_samples=data.get('data_samples'))


@MODELS.register_module()
class VolumeSegmentor(BaseModel):
    """A backbone of volumes and a decoder that gives logits: what mmseg's EncoderDecoder is to
    images.

    It trains on patches. In a test a window slides over the volume (MONAI's
    ``sliding_window_inference``), whose overlapping logits are averaged.

    Args:
        backbone: takes (B, C, D, H, W) to a tuple of maps.
        decode_head: takes the volume and these maps to logits (B, num_classes, D, H, W).
        loss: 'ce' for cross entropy, 'dice_ce' for MONAI's sum of it and Dice of the classes but
            the background.
        test_cfg: ``patch_size`` of the window (a volume that is smaller is padded and cropped
            again), ``overlap`` of windows from 0 to below 1 (0.5), ``mode`` of their weights,
            'gaussian' or 'constant', ``sw_batch_size`` windows at a time (2) and ``mirror_axes``,
            the axes of 0 to 2 along which the volume is mirrored, alone and together, to average
            the logits (none).
        data_preprocessor: config of a :class:`VolumePreprocessor`, its type by default.
        init_cfg: mmengine's.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    def __init__(self, backbone: dict | nn.Module, decode_head: dict | nn.Module,
                 loss: str = 'ce', test_cfg: Mapping[str, Any] | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        if loss not in LOSSES:
            raise ValueError(f'loss={loss!r} does not exist; choose one of {LOSSES}')
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = MODELS.build(
                dict(type='vmamba_mm.VolumePreprocessor') | (data_preprocessor or {}))
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone, self.decode_head = (
            part if isinstance(part, nn.Module) else MODELS.build(part)
            for part in (backbone, decode_head))
        self.loss_name = loss
        self.test_cfg = _check_test_cfg(test_cfg or {})

    def forward(self, inputs: Tensor, data_samples: list | None = None,
                mode: str = 'tensor'):
        """
        Args:
            inputs: (B, C, D, H, W).
            data_samples: of :class:`vmamba_mm.mm.volumes.transforms.PackVolume`, with ``label``,
                (1, D, H, W).
            mode: 'tensor' for logits, 'loss' for a dict of losses, 'predict' for the samples with
                ``pred``, (D, H, W).
        """
        if mode == 'tensor':
            return self.decode_head(inputs, self.backbone(inputs))
        if mode == 'loss':
            labels = torch.stack([sample.label for sample in data_samples])
            return dict(loss=self._loss(self(inputs), labels))
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def _loss(self, logits, labels):
        logits = logits.float()
        if self.loss_name == 'ce':
            return F.cross_entropy(logits, labels[:, 0])
        require('monai')
        from monai.losses import DiceCELoss

        return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(logits, labels)

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        samples = data_samples or [BaseDataElement() for _ in inputs]
        for sample, logits in zip(samples, self.slide(inputs), strict=True):
            sample.pred = logits.argmax(0)
        return samples

    def slide(self, inputs: Tensor) -> Tensor:
        """Logits of whole volumes, (B, C, D, H, W) to (B, num_classes, D, H, W)."""
        require('monai')
        from monai.inferers import sliding_window_inference

        settings = dict(self.test_cfg)
        patch_size, axes = settings.pop('patch_size'), settings.pop('mirror_axes')
        total, mirrors = 0, _subsets(axes)
        for dims in mirrors:
            volume = inputs.flip(dims) if dims else inputs
            logits = sliding_window_inference(volume, patch_size, predictor=self, **settings)
            total = total + (logits.flip(dims) if dims else logits)
        return total / len(mirrors)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Depth of a parameter for layer-wise decay of the learning rate."""
        return self.backbone.get_layer_depth(param_name, 'backbone.')


def _subsets(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """The dimensions of (B, C, D, H, W) to flip: of each subset of the axes."""
    return [tuple(axis + 2 for axis in some) for count in range(len(axes) + 1)
            for some in itertools.combinations(axes, count)]


def _check_test_cfg(given):
    defaults = dict(patch_size=(128, 128, 128), overlap=0.5, mode='gaussian', sw_batch_size=2,
                    mirror_axes=())
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f'test_cfg has unknown keys {unknown}; it may have {list(defaults)}')
    settings = defaults | dict(given)
    if settings['mode'] not in ('gaussian', 'constant'):
        raise ValueError(f"test_cfg: mode={settings['mode']!r} does not exist; choose 'gaussian' "
                         "or 'constant'")
    if not 0 <= settings['overlap'] < 1:
        raise ValueError(f'test_cfg: overlap must be in [0, 1), got {settings["overlap"]!r}')
    if not set(settings['mirror_axes']) <= {0, 1, 2}:
        raise ValueError(f'test_cfg: mirror_axes must be some of 0, 1 and 2, got '
                         f'{settings["mirror_axes"]!r}')
    return settings
