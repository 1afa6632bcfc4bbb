"""What the two mm* lines (onedl-* and upstream OpenMMLab) need before a config is read.

Importing this module imports no mm* package and changes nothing: :func:`prepare_mm` does, which
the tools, tests/conftest.py and an import of :mod:`vmamba_mm.mm` call. No model needs it.

How this works: :func:`prepare_mm` makes three repairs, each in a function whose docstring says what
fails without it and from which version on it can go. They replace functions and values of the
imported packages by name, so that a new release may need a look at each; calling it again changes
nothing.

How to test a change: tests/mm/test_compat.py, and every test that reads a stock config. To see
whether a repair can go, take its call out of :func:`prepare_mm` and run those tests with both
lines: onedl-mmengine with its packages, and mmengine 0.10.7 with mmpretrain 1.2.0, mmdet 3.3.0 and
mmsegmentation 1.2.2.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

from vmamba_mm import zoo
from vmamba_mm.checkpoints.formats import safe_numpy_types
from vmamba_mm.errors import UserError
from vmamba_mm.mm.tasks import TASKS
from vmamba_mm.paths import CONFIGS

# Of several tasks of a package the first has its extra.
EXTRAS = {task.scope: task.extra for task in reversed(TASKS.values()) if task.scope} | dict(
    mmcv='all', mmengine='all', monai='monai', cv2='restoration', diffusers='diffusion',
    torch_fidelity='diffusion', h5py='points')
# What to install beside an upstream mmengine. The extras name the onedl line, whose packages would
# overwrite upstream's, because they share the module names.
UPSTREAM = {'mmpretrain': 'mmpretrain==1.2.0', 'mmdet': 'mmdet==3.3.0',
            'mmseg': 'mmsegmentation==1.2.2', 'mmcv': 'mmcv==2.1.0'}
# Distribution names that differ from the module's; the onedl line keeps the module names too.
MODULES = {'mmsegmentation': 'mmseg', 'mmaction2': 'mmaction'}


def missing_package(module):
    if module == 'mmcv._ext':
        return UserError('mmcv was installed without its compiled operators, which this model '
                         'needs: run tools/setup_env.sh ops, or install an mmcv that has them')
    extra = EXTRAS.get(module)
    if module in UPSTREAM and installed_version('mmengine'):
        return UserError(f'the package {module} is not installed; beside the upstream mmengine '
                         f'install it with: pip install {UPSTREAM[module]}')
    how = f"pip install 'vmamba_mm[{extra}]'" if extra else f'pip install {module}'
    return UserError(f'the package {module} is not installed; install it with: {how}')


def require(module):
    """Raise one clear line if ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise missing_package(module)


def require_working(module):
    """Raise one clear line if ``module`` is not installed or does not fit the packages around it.

    mmengine only warns of this, and fails later on the first type that it does not know.
    """
    require(module)
    try:
        importlib.import_module(f'{module}.models')
    except (AssertionError, ImportError) as err:
        if getattr(err, 'name', None) == 'mmcv._ext':
            raise missing_package('mmcv._ext') from err
        raise UserError(f'the installed {module} cannot be imported: {err}') from err


def installed_version(distribution):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def prepare_mm():
    """Make reading configs and loading checkpoints work on both lines; safe to call again."""
    require('mmengine')
    _find_packages_by_module()
    _allow_checkpoint_types()
    _keep_transformers_out_of_mmpretrain()


def _find_packages_by_module():
    """Let ``mmseg::...`` find the module, whatever its distribution is called, and never run pip.

    Without it:
      - ``mmseg::`` of a config is not found on the onedl line: the table of onedl-mmengine 0.10.12
        has mmseg as the distribution 'mmsegmentation', and what is installed is
        'onedl-mmsegmentation'. Needed until the table of mmengine.config.utils names that.
      - Upstream's mmengine 0.10.7 finds packages by pkg_resources, which setuptools no longer has
        from version 81 on. onedl-mmengine 0.10.12 asks importlib.metadata instead.
      - ``vmamba_mm::`` is not found, as mmengine accepts the packages of its table alone.
      - mmengine.hub runs pip for a package that it does not find, on both lines. We never want
        that, so this part stays.
    """
    import mmengine.config.config as config
    import mmengine.config.utils as config_utils
    import mmengine.hub.hub as hub
    import mmengine.utils as utils
    from mmengine.utils import package_utils

    config_utils.MODULE2PACKAGE.update(mmseg='mmseg', vmamba_mm='vmamba_mm')
    replacements = {f.__name__: f for f in (get_installed_path, install_package, is_installed)}
    for name, ours in (('_get_cfg_metainfo', _find_metadata),
                       ('_get_external_cfg_base_path', _find_config)):
        replacements[name] = _with_our_own(inspect.unwrap(getattr(config_utils, name)), ours)
    for module in (config, config_utils, hub, utils, package_utils):
        for name, replacement in replacements.items():
            if hasattr(module, name):
                setattr(module, name, replacement)


def _with_our_own(theirs, ours):
    """mmengine's function of (folder of a package, name of a config), and ours for this package.

    Theirs look below ``.mim`` in the package's folder, which only an installed package has.
    """
    package = Path(get_installed_path('vmamba_mm'))

    @functools.wraps(theirs)
    def find(package_path, name):
        return ours(name) if Path(package_path) == package else theirs(package_path, name)

    return find


def _find_config(name):
    path = CONFIGS / name
    if not path.is_file():
        raise FileNotFoundError(f'vmamba_mm has no config {name}: there is no file {path}')
    return str(path)


def _find_metadata(name):
    for entry in zoo.entries():
        if entry.config == f'configs/{name}':
            return {'Config': str(entry.path), 'Weights': entry.weights}
    raise ValueError(f'{name} is the config of no published model')  # as mmengine's


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
    """Name the types in mmengine's checkpoints, so that torch.load's safe mode accepts them.

    torch reads safely by default from 2.6 on, and then refuses the HistoryBuffers and numpy scalars
    that mmengine saves in its message hub. Upstream's 0.10.7 does not name them. onedl-mmengine
    0.10.12 does, but with the real getattr, by which a file reaches any code, and it reads a file
    that is refused once more without the safe mode. Needed as long as either is so.
    """
    import torch
    from mmengine.logging.history_buffer import HistoryBuffer

    def history_method(owner, name):
        # A HistoryBuffer pickles its own methods as getattr(HistoryBuffer, name). The real getattr
        # would let a file reach any code through the types allowed here.
        if owner is not HistoryBuffer or not name.isidentifier() or name.startswith('_'):
            raise UserError(f'the checkpoint asks for {owner}.{name}, which is not safe to load')
        return getattr(owner, name)

    history_method.__module__ = 'builtins'
    history_method.__name__ = history_method.__qualname__ = 'getattr'
    torch.serialization.add_safe_globals([
        HistoryBuffer, history_method, *((t, name) for name, t in safe_numpy_types().items())])


def _keep_transformers_out_of_mmpretrain():
    """Switch mmpretrain's multimodal models off where they break the import of all of it.

    mmpretrain imports them whenever transformers is at least 4.28, with no upper limit. Those of
    upstream's 1.2.0 import apply_chunking_to_forward from transformers.modeling_utils, where later
    releases of 4.x no longer have it; onedl-mmpretrain 1.3.6 works with all of 4.x, and neither
    with 5. Needed until mmpretrain names the newest transformers that it works with.
    """
    name = 'mmpretrain.utils.dependency'
    if importlib.util.find_spec('mmpretrain') is None or _multimodal_imports():
        return
    if name in sys.modules:
        sys.modules[name].WITH_MULTIMODAL = False
    elif not any(isinstance(f, _DependencyFinder) for f in sys.meta_path):
        sys.meta_path.insert(0, _DependencyFinder(name))


def _multimodal_imports():
    """Whether those models can be imported beside the installed transformers, if any."""
    transformers = installed_version('transformers')
    if transformers is None:
        return True
    if int(transformers.split('.')[0]) >= 5:
        return False
    spec = importlib.util.find_spec('transformers')
    if installed_version('mmpretrain') is None or spec is None:  # onedl works with all of 4.x
        return True
    # Upstream imports a function from where later releases of 4.x no longer have it.
    source = Path(spec.origin).with_name('modeling_utils.py')
    return 'apply_chunking_to_forward' in source.read_text(encoding='utf-8')


class _DependencyFinder:
    """Sets WITH_MULTIMODAL when mmpretrain is imported, and does not import it just for that."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        stock_exec_module = spec.loader.exec_module

        def exec_module(module):
            stock_exec_module(module)
            module.WITH_MULTIMODAL = False

        spec.loader.exec_module = exec_module
        return spec
