"""Hooks that tools/train.py and tools/test.py add to any config; MESA; the optimizer's groups."""

from vmamba_mm.mm.hooks.checkpoint import AtomicCheckpointHook
from vmamba_mm.mm.hooks.curves import CurvesHook
from vmamba_mm.mm.hooks.data import CheckDataHook
from vmamba_mm.mm.hooks.draw import DrawHook
from vmamba_mm.mm.hooks.exact_resume import ExactResumeHook, MissedValHook
from vmamba_mm.mm.hooks.mesa import MESAHook
from vmamba_mm.mm.hooks.progress import ProgressHook
from vmamba_mm.mm.hooks.restoration import MixPairs, ProgressivePatches
from vmamba_mm.mm.hooks.strict_load import StrictLoadHook
from vmamba_mm.mm.optim import GroupedOptimWrapperConstructor

__all__ = ['AtomicCheckpointHook', 'CheckDataHook', 'CurvesHook', 'DrawHook',
           'ExactResumeHook', 'GroupedOptimWrapperConstructor', 'MESAHook', 'MissedValHook',
           'MixPairs', 'ProgressHook', 'ProgressivePatches', 'StrictLoadHook']
