"""Child registries of mmengine's, with the scope ``vmamba_mm``.

On meeting ``type='vmamba_mm.X'`` mmengine imports this module and then the locations below, so a
config needs no ``custom_imports`` and this package needs no mmdet, mmseg or mmpretrain.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='vmamba_mm',
                  locations=['vmamba_mm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='vmamba_mm',
                 locations=['vmamba_mm.mm.hooks'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry('optim wrapper constructor', parent=MMENGINE_CONSTRUCTORS,
                                      scope='vmamba_mm', locations=['vmamba_mm.mm.optim'])
# These build on mmpretrain's, which is imported when a config names the first of them.
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='vmamba_mm',
                      locations=['vmamba_mm.mm.transforms'])
