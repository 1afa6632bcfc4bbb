"""Python's import system learns the modules of :mod:`vmamba_mm.integrations.dropin.modules`."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from vmamba_mm.integrations.dropin.modules import MODULES, ROOTS, names_of, not_covered

ORIGIN = 'vmamba_mm.dropin'


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules. It stands last among the finders, where it is only asked about
    what is not installed, or first, where it is asked before what is installed."""

    def find_spec(self, fullname, path=None, target=None):
        parent, _, _ = fullname.rpartition('.')
        if parent and not is_ours(sys.modules.get(parent)):
            return None  # of an installed package, or of none of ours
        if fullname not in MODULES:
            if parent:
                raise ModuleNotFoundError(not_covered(fullname), name=fullname)
            return None
        is_package = any(name.startswith(f'{fullname}.') for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin=ORIGIN, is_package=is_package)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        for name, (source, original) in names_of(module.__name__).items():
            implementation = importlib.import_module(f'{__package__}.{source}')
            setattr(module, name, getattr(implementation, original))
        module.__getattr__ = lambda name: _missing(module.__name__, name)


def _missing(module: str, name: str):
    """An attribute that the module ``module`` does not have."""
    full = f'{module}.{name}'
    if full in MODULES:
        return importlib.import_module(full)
    if name.startswith('_'):  # Python and tools look for such names in every module.
        raise AttributeError(f'module {module!r} has no attribute {name!r}')
    raise ImportError(not_covered(module, name), name=module)


def is_ours(module: ModuleType | None) -> bool:
    """Whether the finder has made this module."""
    return isinstance(getattr(module, '__loader__', None), Finder)


def install(replace: bool = False) -> tuple[str, ...]:
    """Make ``mamba_ssm``, ``causal_conv1d``, ``causal_conv1d_cuda`` and ``selective_scan_cuda*``
    importable in this process.

    Args:
        replace: also where one of them is installed, which is left alone otherwise. Use it where
            an installation is broken (``undefined symbol``) or lacks a fork's arguments
            (``bimamba_type``). Modules that were imported before are forgotten; names that code
            has taken from them stay what they were.

    Returns:
        The names that this package provides from now on.

    Example:
        >>> import vmamba_mm.dropin
        >>> served = vmamba_mm.dropin.install(replace=True)
        >>> from mamba_ssm import Mamba
        >>> Mamba(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 9, 16])
    """
    _remove_finders()
    if replace:
        sys.meta_path.insert(0, Finder())
        _forget(lambda module: not is_ours(module))
    else:
        sys.meta_path.append(Finder())
        # Which of them are installed may have changed, or was covered by replace=True.
        _forget(is_ours)
    importlib.invalidate_caches()
    return provided()


def uninstall() -> None:
    """Undo :func:`install`; what code has imported meanwhile stays what it was."""
    _remove_finders()
    _forget(is_ours)


def provided() -> tuple[str, ...]:
    """The names without a dot that an import would get from this package now."""
    return tuple(name for name in ROOTS if isinstance(_loader(name), Finder))


def _loader(name: str):
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, '__loader__', None)
    spec = importlib.util.find_spec(name)
    return spec and spec.loader


def _remove_finders() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]


def _forget(condition) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in ROOTS and condition(module):
            del sys.modules[name]
