"""The recurrences as ops in a library of C++, which AOTInductor's files call."""

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError
from vmamba_mm.ops.core.compile import cache_dir

SOURCE = Path(__file__).with_name('recurrences.cpp')
#: The file that lies beside a .pt2 file, for the programs that run it.
LIBRARY = 'libvmamba_mm_recurrences.so'


def compiler() -> str:
    """The C++ compiler, by $CXX or g++.

    Raises:
        UserError: if there is none.
    """
    name = os.environ.get('CXX') or 'g++'
    if shutil.which(name) is None:
        raise UserError(f'--to pt2 compiles C++ and there is no {name}: install one, or choose '
                        '--to onnx')
    return name


@functools.cache
def load() -> Path:
    """The library, compiled for this torch by the first call that is ever made, and open.

    Raises:
        UserError: without a compiler, or with its words where it fails.
    """
    key = hashlib.sha256(f'{torch.__version__} {SOURCE.read_text()}'.encode()).hexdigest()[:16]
    library = cache_dir() / f'{key}.so'
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f'.{os.getpid()}')
        command = [
            compiler(), '-std=c++20', '-O3', '-fopenmp', '-shared', '-fPIC', str(SOURCE), '-o',
            str(own), f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
            *(f'-I{path}' for path in include_paths()), *(f'-L{path}' for path in library_paths()),
            '-ltorch', '-ltorch_cpu', '-lc10']
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'--to pt2: {command[0]} does not compile {SOURCE.name}: '
                            f'{done.stderr.strip()[:300]}')
        own.replace(library)
    torch.ops.load_library(str(library))
    for name, fake in (('lines', lambda a, x, reverse: (
                            torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[1:]),
                            x.new_empty(x.shape[1:]))),
                       ('carries', lambda a, x, reverse: torch.empty_like(x)),
                       ('states', lambda a, x, reverse: torch.empty_like(x)),
                       ('means', lambda decay, k, v, reverse: tuple(
                           torch.empty_like(k) for _ in range(3)))):
        torch.library.register_fake(f'vmamba_mm_native::{name}', fake)
    return library


def put_beside(file: Path) -> Path:
    """A copy of the library beside a .pt2 file."""
    copy = file.parent / LIBRARY
    write_atomic(load().read_bytes(), copy)
    return copy
