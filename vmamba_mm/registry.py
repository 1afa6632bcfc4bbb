"""Child registries of mmengine's, with the scope ``vmamba_mm``.

On meeting ``type='vmamba_mm.X'`` mmengine imports this module and then the locations below, so a
config needs no ``custom_imports`` and this package needs no mmdet, mmseg or mmpretrain.
"""

from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='vmamba_mm',
                  locations=['vmamba_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='vmamba_mm',
                 locations=['vmamba_mm.engine'])
FUNCTIONS = Registry('function', parent=MMENGINE_FUNCTIONS, scope='vmamba_mm',
                     locations=['vmamba_mm.engine'])
