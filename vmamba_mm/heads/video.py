"""The classifier of clips, around any backbone that takes (B, C, T, H, W)."""

import copy
from collections.abc import Sequence

import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor

from vmamba_mm.registry import MODELS


@MODELS.register_module()
class ClipPreprocessor(BaseDataPreprocessor):
    """Puts clips on the device and normalises them; in training it mixes them.

    It has the arguments of mmpretrain's ClsDataPreprocessor. A view (times, crops, repeated
    augmentation) is a sample of the batch in training, and in a test one of those that are
    averaged.

    Args:
        mean, std: of red, green and blue; None to leave the values as they are.
        to_rgb: swap the first and the last channel: pipelines load BGR.
        num_classes: of the soft labels that mixing makes.
        batch_augments: ``augments`` and ``probs`` of mmpretrain's RandomBatchAugment, such as Mixup
            and CutMix; a clip is mixed as an image is, all of its frames alike.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                 to_rgb: bool = False, num_classes: int | None = None,
                 batch_augments: dict | None = None):
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f'mean and std belong together, got mean={mean!r}, std={std!r}')
        if batch_augments and num_classes is None:
            raise ValueError('mixing makes labels for num_classes of the data_preprocessor, which '
                             'is missing')
        for name, values in dict(mean=mean, std=std).items():
            self.register_buffer(name, values if values is None else
                                 torch.tensor(values, dtype=torch.float).view(-1, 1, 1, 1), False)
        self.to_rgb, self.num_classes, self.batch_augments = to_rgb, num_classes, None
        if batch_augments:
            from mmpretrain.models.utils.batch_augments import RandomBatchAugment

            self.batch_augments = RandomBatchAugment(**batch_augments)

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: ``inputs``, (B, V, C, T, H, W) or a list of (V, C, T, H, W), and
                ``data_samples``, mmpretrain's DataSamples or None.

        Returns:
            ``inputs``, in training (B * V, C, T, H, W) and else (B, V, C, T, H, W), float, and
            ``data_samples``, in training one for each view.
        """
        data = self.cast_data(data)
        inputs, samples = data['inputs'], data.get('data_samples')
        if not isinstance(inputs, Tensor):
            inputs = torch.stack(list(inputs))
        if inputs.dim() != 6:
            raise ValueError('clips must have the dimensions (V, C, T, H, W), such as PackClips '
                             f'gives them, got {tuple(inputs.shape[1:])}')
        if self.to_rgb:
            inputs = inputs.flip(2)
        inputs = inputs.float()
        if self.mean is not None:
            inputs = (inputs - self.mean) / self.std
        if training:
            views = inputs.shape[1]
            inputs = inputs.flatten(0, 1)
            if samples is not None:
                samples = [copy.copy(sample) for sample in samples for _ in range(views)]
                if self.batch_augments is not None:
                    inputs = self._mix(inputs, samples)
        return dict(inputs=inputs, data_samples=samples)

    def _mix(self, inputs, samples):
        labels = torch.cat([sample.gt_label for sample in samples])
        scores = torch.nn.functional.one_hot(labels, self.num_classes).float()
        # Those of images, to which the frames are further channels.
        mixed, scores = self.batch_augments(inputs.flatten(1, 2), scores)
        for sample, score in zip(samples, scores, strict=True):
            sample.set_gt_score(score)
        return mixed.view_as(inputs)


@MODELS.register_module()
class VideoClassifier(BaseModel):
    """A backbone of clips and one of mmpretrain's heads.

    In a test the scores of all views of a video are averaged, after the softmax.

    Args:
        backbone: takes clips (B, C, T, H, W); it returns what the neck or the head takes: a tuple
            whose last item is (B, channels) for 'LinearClsHead'.
        head: a classification head of mmpretrain.
        neck: between them.
        drop_rate: dropout of what the head takes.
        train_cfg: ``augments`` and ``probs`` of mmpretrain's RandomBatchAugment: Mixup, CutMix.
        data_preprocessor: config of a :class:`ClipPreprocessor`, its type by default.
        init_cfg: mmengine's.
    """

    def __init__(self, backbone: dict, head: dict, neck: dict | None = None,
                 drop_rate: float = 0.0, train_cfg: dict | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        if not isinstance(data_preprocessor, torch.nn.Module):
            data_preprocessor = dict(type='vmamba_mm.ClipPreprocessor') | (data_preprocessor or {})
            if train_cfg is not None:
                data_preprocessor.setdefault('batch_augments', train_cfg)
            data_preprocessor = MODELS.build(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck) if neck is not None else None
        self.dropout = torch.nn.Dropout(drop_rate) if drop_rate else None
        self.head = MODELS.build(head)

    def extract_feat(self, inputs: Tensor):
        """What the head takes of clips (B, C, T, H, W)."""
        features = self.backbone(inputs)
        if self.neck is not None:
            features = self.neck(features)
        return features if self.dropout is None else tuple(map(self.dropout, features))

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, C, T, H, W), and to 'predict' (B, V, C, T, H, W).
            data_samples: mmpretrain's DataSamples.
            mode: 'tensor' for logits (B, classes), 'loss' for a dict of losses, 'predict' for
                DataSamples with ``pred_score`` and ``pred_label``.
        """
        if mode == 'tensor':
            return self.head(self.extract_feat(inputs))
        if mode == 'loss':
            return self.head.loss(self.extract_feat(inputs), data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        # One view of all videos after another: memory does not grow with the views.
        views = [self.head.predict(self.extract_feat(clips)) for clips in inputs.unbind(1)]
        # The head makes its own samples where there are none.
        results = views[0] if data_samples is None else data_samples
        for result, *of_views in zip(results, *views, strict=True):
            score = torch.stack([sample.pred_score for sample in of_views]).mean(0)
            result.set_pred_score(score).set_pred_label(score.argmax(keepdim=True))
        return results

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Depth of a parameter for layer-wise decay of the learning rate."""
        return self.backbone.get_layer_depth(param_name, 'backbone.')
