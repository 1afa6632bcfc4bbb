"""Child registries of mmengine's, with the scope ``vmamba_mm``.

On meeting ``type='vmamba_mm.X'`` mmengine imports this module and then the locations below, so a
config needs no ``custom_imports`` and this package needs no mmdet, mmseg or mmpretrain.
"""

from importlib import import_module

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry


class _Lean(Registry):
    """A registry, some modules of which need less than others: these are looked through first.

    Args:
        lean: the modules that need less, those that need least first; their classes register on
            import.
    """

    def __init__(self, *args, lean: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.lean = lean

    def get(self, key: str):
        scope, _, name = key.rpartition('.')
        for module in self.lean if scope in ('', self.scope) else ():
            import_module(module)
            if name in self._module_dict:
                return self._module_dict[name]
        return super().get(key)


# These and the transforms, data sets and metrics build on the frameworks', which are imported when
# a config names the first of them.
MODELS = _Lean('model', parent=MMENGINE_MODELS, scope='vmamba_mm',
               lean=['vmamba_mm.models', 'vmamba_mm.heads', 'vmamba_mm.mm.volumes.models',
                     'vmamba_mm.mm.restoration.models', 'vmamba_mm.mm.diffusion.models'],
               locations=['vmamba_mm.mm.segmentation.models'])
TRANSFORMS = _Lean('transform', parent=MMENGINE_TRANSFORMS, scope='vmamba_mm',
                   lean=['vmamba_mm.mm.points.transforms', 'vmamba_mm.mm.volumes.transforms',
                         'vmamba_mm.mm.restoration.transforms',
                         'vmamba_mm.mm.language.transforms',
                         'vmamba_mm.mm.segmentation.transforms',
                         'vmamba_mm.mm.diffusion.transforms'],
                   locations=['vmamba_mm.mm.transforms', 'vmamba_mm.mm.video.transforms'])
DATASETS = _Lean('dataset', parent=MMENGINE_DATASETS, scope='vmamba_mm',
                 lean=['vmamba_mm.mm.points.dataset', 'vmamba_mm.mm.volumes.dataset',
                       'vmamba_mm.mm.restoration.dataset',
                       'vmamba_mm.mm.language.dataset'],
                 locations=['vmamba_mm.mm.image_list', 'vmamba_mm.mm.video.dataset'])
METRICS = _Lean('metric', parent=MMENGINE_METRICS, scope='vmamba_mm',
                lean=['vmamba_mm.mm.points.metrics', 'vmamba_mm.mm.volumes.metrics',
                      'vmamba_mm.mm.restoration.metrics', 'vmamba_mm.mm.diffusion.metrics',
                      'vmamba_mm.mm.language.metrics'],
                locations=['vmamba_mm.mm.segmentation.metrics'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='vmamba_mm',
                 locations=['vmamba_mm.mm.hooks'])
MODEL_WRAPPERS = Registry('model_wrapper', parent=MMENGINE_WRAPPERS, scope='vmamba_mm',
                          locations=['vmamba_mm.mm.wrappers'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry('optim wrapper constructor', parent=MMENGINE_CONSTRUCTORS,
                                      scope='vmamba_mm', locations=['vmamba_mm.mm.optim'])
