"""transformers' own Mamba, Mamba-2, FalconMamba and Jamba on the ops of this package.

From version 5.16 on their modules call convolution, scan and step by names that stand for
``mamba_ssm`` and ``causal_conv1d`` where these are installed when transformers is imported, and for
loops in plain PyTorch, its slow path, where they are not. :func:`install_transformers` puts
functions of this package under these names, whatever is installed and whoever has imported
transformers before. Models that exist already use them from then on.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

from vmamba_mm.errors import UserError
from vmamba_mm.integrations.dropin.conv import causal_conv1d_fn, causal_conv1d_update
from vmamba_mm.integrations.dropin.scan import selective_scan_fn
from vmamba_mm.integrations.dropin.ssd import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from vmamba_mm.integrations.dropin.state_update import selective_state_update

_CONVS = dict(causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update)


def mamba_inner_fn(*args, **kwargs) -> None:
    """By None the models take the single steps, convolution and scan, as on the slow path.

    The fused call does not say which activation the convolution has, and that of mamba_ssm has the
    norm of dt of FalconMamba at another place.
    """


_MAMBA = dict(_CONVS, mamba_inner_fn=mamba_inner_fn, mamba_selective_scan=selective_scan_fn,
              mamba_selective_state_update=selective_state_update)
_MAMBA2 = dict(_CONVS, mamba2_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined,
               mamba2_chunk_scan=mamba_chunk_scan_combined,
               mamba2_selective_state_update=selective_state_update)
#: Folder in ``transformers.models`` -> what its module calls -> the function of this package.
MODELS: dict[str, dict[str, Callable]] = {
    'mamba': _MAMBA, 'falcon_mamba': _MAMBA, 'jamba': _MAMBA, 'mamba2': _MAMBA2}
#: What transformers says of a call, and has no effect on its result.
_WITHOUT_EFFECT = ('use_mambapy', 'use_associative_scan')


def install_transformers() -> tuple[str, ...]:
    """Let transformers' Mamba, Mamba-2, FalconMamba and Jamba run on the ops of this package.

    Forward and backward, in training, in one pass and token by token from a cache, on a CPU and on
    a GPU. Weights, configs and the rest of the models stay transformers' own. In the activation of
    the convolution, SiLU alone is ours: with another one the convolution stays transformers'.

    Returns:
        The folders of ``transformers.models`` whose models now use this package.

    Raises:
        UserError: if transformers is not installed, or its version has none of these names.
    """
    if importlib.util.find_spec('transformers') is None:
        raise UserError('transformers is not installed: pip install transformers')
    done = []
    for name, functions in MODELS.items():
        module = importlib.import_module(f'transformers.models.{name}.modeling_{name}')
        if not all(hasattr(module, function) for function in functions):
            continue
        for function, ours in functions.items():
            theirs = getattr(module, function)
            if not hasattr(theirs, '_of_transformers'):
                setattr(module, function, _replacement(theirs, ours))
        done.append(name)
    if not done:
        version = sys.modules['transformers'].__version__
        raise UserError(f'transformers {version} does not call its scans by the names that '
                        'install_transformers replaces; 5.24 does')
    return tuple(done)


def uninstall_transformers() -> None:
    """Undo :func:`install_transformers`."""
    for name, functions in MODELS.items():
        module = sys.modules.get(f'transformers.models.{name}.modeling_{name}')
        for function in functions if isinstance(module, ModuleType) else ():
            theirs = getattr(getattr(module, function, None), '_of_transformers', None)
            if theirs is not None:
                setattr(module, function, theirs)


def _replacement(theirs: Callable, ours: Callable) -> Callable:
    """Our function as transformers calls it, which may say more than it takes.

    What changes the result and is no argument of ours is an error: such models may be newer.
    """
    known = inspect.signature(ours).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())

    @functools.wraps(theirs)
    def call(*args, **kwargs):
        if kwargs.get('activation', 'silu') not in (None, 'silu', 'swish'):
            return theirs(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items()
                  if takes_all or k in known or v is not None and k not in _WITHOUT_EFFECT}
        return ours(*args, **kwargs)

    call._of_transformers = theirs
    return call
