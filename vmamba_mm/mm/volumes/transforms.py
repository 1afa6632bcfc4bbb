"""Steps of a pipeline of volumes: reading, MONAI's transforms, and what a model takes.

MONAI is imported when the first of them is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require
from vmamba_mm.registry import TRANSFORMS

_SAME_PLACE = 1e-3  # of the entries of an affine matrix, in mm


@TRANSFORMS.register_module()
class LoadVolume:
    """Read the files of a case as one volume with its channels, and its mask.

    Args:
        with_mask: whether there is one.

    Adds ``image``, MONAI's MetaTensor (C, X, Y, Z) in fp32, and ``label``, (1, X, Y, Z), both with
    the affine matrix of the file, so that MONAI's ``Orientationd`` and ``Spacingd`` bring them to
    one orientation and spacing.

    Raises:
        UserError: if a file cannot be read or is no single volume, or if those of a case are not of
            one size and place.
    """

    def __init__(self, with_mask: bool = True):
        require('monai')
        from monai.transforms import LoadImage

        self.with_mask = with_mask
        self.read = LoadImage(image_only=True, ensure_channel_first=True)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        first, *_ = paths = results['files']
        volumes = [self._read(path) for path in paths]
        parts = dict(zip(paths, volumes, strict=True))
        if self.with_mask:
            if results.get('mask_file') is None:
                raise UserError(f'the case {results["case"]} has no mask: name its file by mask= '
                                'of the data set')
            results['label'] = parts[results['mask_file']] = self._read(results['mask_file'])
        for path, volume in parts.items():
            if volume.shape != volumes[0].shape:
                raise UserError(f'{path} has {_size(volume)} voxels and {first} '
                                f'{_size(volumes[0])}: the volumes and the mask of a case must be '
                                'of one size; resample them to one grid')
            if (volume.affine - volumes[0].affine).abs().max() > _SAME_PLACE:
                raise UserError(f'{path} lies elsewhere than {first}: their affine matrices '
                                'differ; register the volumes of a case and resample them to one '
                                'grid')
        # torch.cat would make a batch of MetaTensors.
        whole = torch.cat([volume.as_tensor() for volume in volumes])
        results['image'] = type(volumes[0])(whole, meta=volumes[0].meta)
        return results

    def _read(self, path):
        try:
            volume = self.read(path)
        except Exception as err:
            reason = str(err).strip().partition('\n')[0] or type(err).__name__
            raise UserError(f'{path} cannot be read as a volume: {reason}') from err
        if volume.dim() != 4 or len(volume) != 1:
            raise UserError(f'{path} has the shape {tuple(volume.shape[1:])} with '
                            f'{len(volume)} channel(s), and a single volume (X, Y, Z) is needed: '
                            'write each channel into a file of its own')
        return volume.float()


def _size(volume: Tensor) -> str:
    return 'x'.join(map(str, volume.shape[1:]))


@TRANSFORMS.register_module()
class MonaiTransforms:
    """MONAI's dictionary transforms, one after the other.

    Args:
        transforms: for each its class in ``monai.transforms`` as ``type``, and its arguments:
            ``dict(type='Spacingd', keys=['image', 'label'], pixdim=[1, 1, 1])``.

    Raises:
        ValueError: if MONAI has no such class.
        TypeError: if it does not take these arguments.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]]):
        require('monai')
        import monai.transforms

        built = []
        for settings in transforms:
            arguments = {k: v for k, v in settings.items() if k != 'type'}
            name = settings.get('type')
            kind = getattr(monai.transforms, str(name), None)
            if kind is None:
                raise ValueError(f'monai.transforms has no {name!r}: the type of a step must be a '
                                 "dictionary transform of MONAI, such as 'Spacingd'")
            try:
                built.append(kind(**arguments))
            except TypeError as err:
                raise TypeError(f'{name}: {err}') from err
        self.transform = monai.transforms.Compose(built)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        results = self.transform(results)
        # Transforms that cut several patches return a list.
        return results[0] if isinstance(results, list) and len(results) == 1 else results


@TRANSFORMS.register_module()
class PackVolume:
    """What a :class:`vmamba_mm.mm.volumes.models.VolumeSegmentor` takes.

    Args:
        num_classes: numbers of classes in the mask go from 0 to one below this.

    Gives ``inputs``, (C, D, H, W) in fp32, and ``data_samples``, a BaseDataElement with ``case``
    and, where there is a mask, ``label``, (1, D, H, W) in int64.

    Raises:
        UserError: if a mask has other numbers, if it is not of the volume's size, or if the volume
            has values that are no numbers.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image, case = _plain(results['image']).float(), results.get('case', '')
        if not image.isfinite().all():
            raise UserError(f'the volume of {case} has values that are NaN or infinite: repair the '
                            'file, or let a step before PackVolume replace them')
        sample = BaseDataElement(metainfo=dict(case=case))
        if 'label' in results:
            label = _plain(results['label'])
            if label.shape[1:] != image.shape[1:]:
                raise UserError(f'the mask of {case} has {_size(label)} voxels and the volume '
                                f'{_size(image)}: transforms that change the size need both '
                                "keys, ['image', 'label']")
            found = label.unique()
            wrong = found[(found != found.round()) | (found < 0) | (found >= self.num_classes)]
            if len(wrong):
                raise UserError(f'the mask of {case} has the label {wrong[0].item():g}; expected '
                                f'are 0 to {self.num_classes - 1}: number the classes anew (MONAI '
                                'has MapLabelValued), or change num_classes')
            sample.label = label.long()
        return dict(inputs=image, data_samples=sample)


def _plain(x: Any) -> Tensor:
    """A tensor without MONAI's metadata, which no worker need send."""
    tensor = x.as_tensor() if hasattr(x, 'as_tensor') else torch.as_tensor(x)
    return tensor.contiguous()
