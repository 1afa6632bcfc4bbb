"""Decoders and models of tasks that are no backbones, for mmengine's registry."""

from vmamba_mm.heads.clip import ClipTower
from vmamba_mm.heads.losses import DiceLoss
from vmamba_mm.heads.pyramid import SimpleFeaturePyramid
from vmamba_mm.heads.token_label import TokenLabelHead
from vmamba_mm.heads.video import ClipPreprocessor, VideoClassifier
from vmamba_mm.heads.videomamba import (
    DistilledVideoMamba,
    MaskedVideoMamba,
    SelfDistillation,
    VideoEncoder,
)

__all__ = ['ClipPreprocessor', 'ClipTower', 'DiceLoss', 'DistilledVideoMamba', 'MaskedVideoMamba',
           'SelfDistillation', 'SimpleFeaturePyramid', 'TokenLabelHead', 'VideoClassifier',
           'VideoEncoder']
