"""What is exported of a model: the network from normalised images to tensors."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmamba_mm.errors import UserError
from vmamba_mm.models.base import Backbone


class Network(nn.Module):
    """A model as a function of images (B, C, H, W), normalised as its data preprocessor does.

    Of a classifier the scores of classes before a softmax; of a segmentor the logits of its decode
    head; of a detector the maps of its neck, or of its backbone without one; of a backbone its
    maps; of a model of timm or any other module what a call returns.

    Args:
        model: in evaluation, on the CPU.

    Raises:
        UserError: on a model of clips, volumes, clouds or text.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind = _kind_of(model)
        backbone = model if isinstance(model, Backbone) else getattr(model, 'backbone', None)
        if isinstance(backbone, Backbone) and backbone.clip_length(backbone.arch):
            raise UserError(f'{type(backbone).__name__} takes clips, and export.py exports models '
                            'of single images: choose a config of images')

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        if self.kind == 'detector':
            outputs = model.extract_feat(image)
        elif self.kind in ('classifier', 'segmentor'):
            outputs = model(image, mode='tensor')
        else:
            outputs = model(image)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    @property
    def output_names(self) -> list[str]:
        """Of maps their number is added."""
        return {'classifier': ['scores'], 'segmentor': ['logits']}.get(self.kind, ['output'])


def _kind_of(model: nn.Module) -> str:
    names = {cls.__name__: cls.__module__.partition('.')[0] for cls in type(model).__mro__}
    for name, package, kind in (('BaseClassifier', 'mmpretrain', 'classifier'),
                                ('BaseDetector', 'mmdet', 'detector'),
                                ('BaseSegmentor', 'mmseg', 'segmentor')):
        if names.get(name) == package:
            return kind
    if 'BaseModel' in names and not isinstance(model, Backbone):
        raise UserError(f'export.py exports classifiers, detectors, segmentors, backbones and '
                        f'models of timm, and {type(model).__name__} is none of them')
    return 'module'


class AnySize(TorchFunctionMode):
    """Functions of PyTorch that exporters know for one size only, in a form for any."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.adaptive_avg_pool2d:
            return _adaptive_avg_pool2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _adaptive_avg_pool2d(input: Tensor, output_size: int | tuple[int, int]) -> Tensor:
    """By products with the windows of rows and of columns."""
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    if height == width == 1:
        return input.mean((-2, -1), keepdim=True)
    rows, columns = (input.shape[-2 + i] if bins is None else bins
                     for i, bins in enumerate((height, width)))
    of_rows, of_columns = (_windows(bins, size, input) for bins, size in (
        (rows, input.shape[-2]), (columns, input.shape[-1])))
    return of_rows @ input @ of_columns.mT


def _windows(bins: int, size: int, like: Tensor) -> Tensor:
    """(bins, size): the mean over each window."""
    index = torch.arange(bins, device=like.device)[:, None]
    places = torch.arange(size, device=like.device)
    first, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
    inside = ((places >= first) & (places < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
