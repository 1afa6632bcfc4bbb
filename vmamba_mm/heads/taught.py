"""Classifiers of mmpretrain's kind that learn from labels and from a trained model."""

from typing import Any

import torch
from mmengine.model import BaseModel, BaseModule
from torch import Tensor, nn

from vmamba_mm.registry import MODELS


class TaughtClassifier(BaseModel):
    """A classifier with a teacher, for training; its backbone and head are those of the plain one.

    The teacher is not trained, and is in no state dict. A subclass says what its head reads
    (:meth:`read`) and what the teacher adds to the losses (:meth:`losses`).

    Args:
        backbone: config of the backbone.
        head: of a classification head of mmpretrain's kind.
        teacher: of the model that teaches.
        train_cfg: ``augments`` and ``probs`` of mmpretrain's RandomBatchAugment: Mixup, CutMix. The
            teacher sees the same mixed images.
        data_preprocessor: config of mmpretrain's ClsDataPreprocessor, its type by default.
        init_cfg: mmengine's.
    """

    def __init__(self, backbone: dict, head: dict, teacher: dict, train_cfg: dict | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = dict(type='mmpretrain.ClsDataPreprocessor') | (
                data_preprocessor or {})
            data_preprocessor.setdefault('batch_augments', train_cfg)
            data_preprocessor = MODELS.build(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = MODELS.build(head)
        # In a list it is no submodule.
        self._teacher = [MODELS.build(teacher).eval().requires_grad_(False)]

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def init_weights(self) -> None:
        super().init_weights()
        self.teacher.init_weights()

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, 3, H, W).
            data_samples: mmpretrain's DataSamples.
            mode: 'tensor' for logits (B, classes), 'loss' for a dict of losses, 'predict' for
                DataSamples.
        """
        outs = self.backbone(inputs)
        if mode == 'tensor':
            return self.head(self.read(outs))
        if mode == 'predict':
            return self.head.predict(self.read(outs), data_samples)
        if mode == 'loss':
            with torch.no_grad():
                wanted = self.teacher.to(inputs.device)(inputs)
            return self.losses(outs, wanted, data_samples)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def read(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the head takes of the backbone's outputs."""
        return outs

    def losses(self, outs: tuple[Tensor, ...], wanted: Any, data_samples: list
               ) -> dict[str, Tensor]:
        """The losses by name.

        Args:
            outs: of the backbone.
            wanted: what the teacher says of the same images.
            data_samples: mmpretrain's DataSamples.
        """
        raise NotImplementedError


@MODELS.register_module()
class HardDistillation(TaughtClassifier):
    """A classifier whose second set of logits learns the class that a teacher would choose.

    "Hard-label distillation" of DeiT (arXiv 2012.12877, section 4), as EfficientViM's distilled
    models were trained. Under autocast the teacher runs in half precision too.

    Args:
        backbone: config of a backbone.
        head: config of a head with a set of logits for the teacher:
            :class:`vmamba_mm.heads.StageFusionHead` with ``distilled=True``.
        teacher: config of a model that gives logits, as :class:`vmamba_mm.heads.TimmTeacher`. It is
            not trained, and is in no state dict.
        neck: None: such a head takes what the backbone gives.
        train_cfg: ``augments`` and ``probs`` of mmpretrain's RandomBatchAugment: Mixup, CutMix. The
            teacher sees the same mixed images.
        data_preprocessor: config of mmpretrain's ClsDataPreprocessor, its type by default.
        init_cfg: mmengine's.
    """

    def __init__(self, backbone: dict, head: dict, teacher: dict, neck: None = None, **kwargs):
        if neck is not None:
            raise ValueError('the head of HardDistillation takes what the backbone gives, without '
                             f'a neck, got {neck!r}')
        super().__init__(backbone, head, teacher, **kwargs)

    def losses(self, outs: tuple[Tensor, ...], wanted: Tensor, data_samples: list
               ) -> dict[str, Tensor]:
        return self.head.loss(outs, data_samples, teacher=wanted)


@MODELS.register_module()
class TimmTeacher(BaseModule):
    """A classifier of timm with its published weights, which ``init_weights`` downloads.

    Args:
        model_name: in timm, with a tag of weights: ``'regnety_160.deit_in1k'``, the teacher of
            DeiT.
        kwargs: of ``timm.create_model``.

    Shape: (B, 3, H, W), normalised as the images of the student, to logits (B, classes).
    """

    def __init__(self, model_name: str, **kwargs):
        super().__init__()
        import timm

        self.model = timm.create_model(model_name, **kwargs)

    def init_weights(self) -> None:
        from timm.models import load_pretrained

        load_pretrained(self.model)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)
