"""Decoders and models of tasks that are no backbones, for mmengine's registry."""

from vmamba_mm.heads.video import ClipPreprocessor, VideoClassifier

__all__ = ['ClipPreprocessor', 'VideoClassifier']
