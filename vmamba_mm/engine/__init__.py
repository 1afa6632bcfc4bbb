"""Hooks that tools/train.py and tools/test.py add to any config."""

from .checkpoint import AtomicCheckpointHook
from .curves import CurvesHook
from .data import CheckDataHook
from .exact_resume import ExactResumeHook, MissedValHook
from .progress import ProgressHook
from .strict_load import StrictLoadHook

__all__ = ['AtomicCheckpointHook', 'CheckDataHook', 'CurvesHook', 'ExactResumeHook',
           'MissedValHook', 'ProgressHook', 'StrictLoadHook']
