"""Hooks that tools/train.py and tools/test.py add to any config; the optimizer's groups."""

from vmamba_mm.engine.checkpoint import AtomicCheckpointHook
from vmamba_mm.engine.curves import CurvesHook
from vmamba_mm.engine.data import CheckDataHook
from vmamba_mm.engine.draw import DrawHook
from vmamba_mm.engine.exact_resume import ExactResumeHook, MissedValHook
from vmamba_mm.engine.optim import GroupedOptimWrapperConstructor
from vmamba_mm.engine.progress import ProgressHook
from vmamba_mm.engine.strict_load import StrictLoadHook

__all__ = ['AtomicCheckpointHook', 'CheckDataHook', 'CurvesHook', 'DrawHook',
           'ExactResumeHook', 'GroupedOptimWrapperConstructor', 'MissedValHook', 'ProgressHook',
           'StrictLoadHook']
