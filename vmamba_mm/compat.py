"""What the two mm* lines (onedl-* and upstream OpenMMLab) need before a config is read.

``prepare_mm()`` is called by the tools and by tests/conftest.py. Nothing here is imported by the
model, and importing this module imports no mm* package.
"""

import importlib.util
import sys

EXTRAS = {'mmpretrain': 'cls', 'mmdet': 'det', 'mmseg': 'seg', 'mmcv': 'all', 'mmengine': 'all'}
# Distribution names that differ from the module's; the onedl line keeps the module names too.
MODULES = {'mmsegmentation': 'mmseg', 'mmaction2': 'mmaction'}


class UserError(RuntimeError):
    """A mistake in the input: shown as one line, without a traceback."""

    def __str__(self):
        # A DataLoader worker's exception comes back as one string with the worker's traceback in
        # it; the line after the class name is the message.
        text = super().__str__()
        marker = f'{type(self).__name__}: '
        if text.startswith('Caught ') and marker in text:
            text = text.rsplit(marker, 1)[1]
        return text.strip()


def missing_package(module):
    extra = EXTRAS.get(module)
    how = f"pip install 'vmamba_mm[{extra}]'" if extra else f'pip install {module}'
    return UserError(f'the package {module} is not installed; install it with: {how}')


def require(module):
    """Raise one clear line if ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise missing_package(module)


def prepare_mm():
    """Make reading configs and loading checkpoints work on both lines; safe to call again."""
    require('mmengine')
    _find_packages_by_module()
    _allow_checkpoint_types()
    _keep_transformers_out_of_mmpretrain()


def _find_packages_by_module():
    """Let ``mmseg::...`` find the module, whatever its distribution is called, and never run pip.

    The onedl line ships mmseg as a distribution that mmengine's table does not know; upstream asks
    pkg_resources, which new setuptools lack; and mmengine.hub installs what it does not find.
    """
    import mmengine.config.config as config
    import mmengine.config.utils as config_utils
    import mmengine.hub.hub as hub
    import mmengine.utils as utils
    from mmengine.utils import package_utils

    config_utils.MODULE2PACKAGE['mmseg'] = 'mmseg'
    for module in (config, hub, utils, package_utils):
        for replacement in (get_installed_path, install_package, is_installed):
            if hasattr(module, replacement.__name__):
                setattr(module, replacement.__name__, replacement)


def get_installed_path(package):
    """The folder of an installed package (replaces mmengine's function of this name)."""
    module = MODULES.get(package, package)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise missing_package(module)
    return spec.origin.rpartition('/__init__.py')[0] or spec.submodule_search_locations[0]


def install_package(package):
    """Never installs anything (replaces mmengine's function of this name, which runs pip)."""
    require(MODULES.get(package, package))


def is_installed(package):
    """Whether a distribution or module is there (replaces mmengine's, without pkg_resources)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(package)
        return True
    except PackageNotFoundError:
        return importlib.util.find_spec(MODULES.get(package, package)) is not None


def _allow_checkpoint_types():
    """Name the types in mmengine's checkpoints, so that torch.load's safe mode accepts them."""
    import numpy as np
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    core = np._core if hasattr(np, '_core') else np.core
    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    dtypes = {type(np.dtype(name)) for name in
              ('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64',
               'float16', 'float32', 'float64', 'str', 'bytes')}

    def history_method(owner, name):
        # A HistoryBuffer pickles its own methods as getattr(HistoryBuffer, name). The real getattr
        # would let a file reach any code through the types allowed here.
        if owner is not HistoryBuffer or not name.isidentifier() or name.startswith('_'):
            raise UserError(f'the checkpoint asks for {owner}.{name}, which is not safe to load')
        return getattr(owner, name)

    history_method.__module__ = 'builtins'
    history_method.__name__ = history_method.__qualname__ = 'getattr'
    types = [HistoryBuffer, history_method, np.ndarray, np.dtype, *dtypes]
    for function in (reconstruct, scalar):
        types.append(function)
        # numpy 1 and 2 write different module names for the same two functions.
        for package in ('numpy.core', 'numpy._core'):
            types.append((function, f'{package}.multiarray.{function.__name__}'))
    try:
        torch.serialization.add_safe_globals(types)
    except (TypeError, AttributeError):  # torch < 2.6 takes no (object, name) pairs
        torch.serialization.add_safe_globals([t for t in types if not isinstance(t, tuple)])


def _keep_transformers_out_of_mmpretrain():
    """mmpretrain's multimodal models cannot be imported beside transformers 5: switch them off."""
    from importlib.metadata import PackageNotFoundError, version

    name = 'mmpretrain.utils.dependency'
    try:
        if int(version('transformers').split('.')[0]) < 5:
            return
    except PackageNotFoundError:
        return
    if importlib.util.find_spec('mmpretrain') is None:
        return
    if name in sys.modules:
        sys.modules[name].WITH_MULTIMODAL = False
    elif not any(isinstance(f, _DependencyFinder) for f in sys.meta_path):
        sys.meta_path.insert(0, _DependencyFinder(name))


class _DependencyFinder:
    """Sets WITH_MULTIMODAL when mmpretrain is imported, and does not import it just for that."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.WITH_MULTIMODAL = False

        spec.loader.exec_module = exec_module
        return spec
