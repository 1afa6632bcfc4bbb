"""Where the CUDA libraries that torch came with lie, on Linux and on Windows (not tried there)."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

WINDOWS = sys.platform == 'win32'
#: what :func:`candidates` looks at, in words for an error
PLACES = ('the loaded libraries, nvidia/*/lib or bin of the Python path, torch/lib, '
          f'{sys.prefix}/lib, CUDA_HOME, CUDA_PATH, /usr/local/cuda, and the loader')


def candidates(name: str, majors: Iterable[int]) -> Iterator[str]:
    """Paths of the library ``name`` ('nvrtc', 'cublasLt'), those that are loaded first, then names
    for the loader by the ``majors`` of CUDA; each once."""
    pattern = rf'{name}64_[\d_]+\.dll' if WINDOWS else rf'lib{name}(-[0-9a-f]+)?\.so[.\d]*'
    files = [file for folder in _folders() for file in _sorted_files(folder)]
    yield from dict.fromkeys(path for path in (*loaded_libraries(), *files)
                             if re.fullmatch(pattern, os.path.basename(path)))
    if WINDOWS:
        suffixes = ('{}.dll', '{}0_0.dll')  # cublasLt64_13.dll, nvrtc64_130_0.dll
        yield from (f'{name}64_' + suffix.format(major) for major in majors for suffix in suffixes)
    else:
        yield from (f'lib{name}.so.{major}' for major in majors)
        yield f'lib{name}.so'


def loaded_libraries() -> list[str]:
    """The libraries of this process; none where the system does not list them in a file."""
    with contextlib.suppress(OSError), open('/proc/self/maps') as maps:
        return sorted({line.split(maxsplit=5)[5].rstrip('\n') for line in maps if '.so' in line})
    return []


def _folders() -> Iterator[Path]:
    home = Path(torch.__file__).parent
    for root in (home.parent, *map(Path, sys.path)):
        for pattern in ('nvidia/*/lib', 'nvidia/*/bin', 'nvidia/*/bin/x86_64'):
            yield from sorted(root.glob(pattern))
    yield home / 'lib'
    yield from (Path(sys.prefix, name) for name in ('lib', 'Library/bin'))  # conda's
    for root in (os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda'):
        if root:
            yield from (Path(root, name) for name in ('lib64', 'lib', 'bin', 'bin/x64'))


def _sorted_files(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob('*64_*.dll' if WINDOWS else 'lib*.so*')))
