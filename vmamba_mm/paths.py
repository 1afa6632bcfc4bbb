"""Where the configs and the kernels' sources lie: beside the package in a checkout, else in it.

A wheel has them inside the package, the configs where OpenMMLab's tools look for them (setup.py).
A checkout needs no symbolic links for this, which git does not make on Windows.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def _find(installed: str, name: str) -> Path:
    folder = _PACKAGE / installed
    return folder if folder.is_dir() else _PACKAGE.parent / name


KERNELS = _find('kernels', 'kernels')
CONFIGS = _find('.mim/configs', 'configs')
