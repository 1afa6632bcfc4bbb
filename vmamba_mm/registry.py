"""Child registries of mmengine's, with the scope ``vmamba_mm``.

On meeting ``type='vmamba_mm.X'`` mmengine imports this module and then the locations below, so a
config needs no ``custom_imports`` and this package needs no mmdet, mmseg or mmpretrain.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='vmamba_mm',
                  locations=['vmamba_mm.models', 'vmamba_mm.heads'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='vmamba_mm',
                 locations=['vmamba_mm.mm.hooks'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry('optim wrapper constructor', parent=MMENGINE_CONSTRUCTORS,
                                      scope='vmamba_mm', locations=['vmamba_mm.mm.optim'])
# These and the data sets build on mmpretrain's, imported when a config names the first of them.
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='vmamba_mm',
                      locations=['vmamba_mm.mm.masks', 'vmamba_mm.mm.transforms',
                                 'vmamba_mm.mm.video.transforms'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='vmamba_mm',
                    locations=['vmamba_mm.mm.image_list', 'vmamba_mm.mm.video.dataset'])
