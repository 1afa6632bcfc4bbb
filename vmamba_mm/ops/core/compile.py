"""CUDA kernels compiled where they run, by the NVRTC of the installed torch, with a disk cache.

Nothing else is needed: no nvcc, no compiler, no headers. :func:`build` compiles, without a GPU too;
ops ask :mod:`vmamba_mm.ops.core.launch` for a kernel that is loaded.

The cache is ``$VMAMBA_MM_CACHE_DIR``, else ``$XDG_CACHE_HOME/vmamba_mm``, else
``~/.cache/vmamba_mm``; it may be deleted at any time.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vmamba_mm.atomic import write_atomic
from vmamba_mm.ops.core import libraries
from vmamba_mm.ops.core.parameters import Field, fields_of, packed_size
from vmamba_mm.paths import KERNELS

OPTIONS = ('--std=c++17', '-lineinfo')
CACHE_MAGIC = b'vmamba_mm kernel 1\n'


class Instance(NamedTuple):
    """One kernel to compile, hashable.

    ``source`` is a file of the package's kernels folder, ``name`` a kernel's name or a template
    instantiation (``'scan<float, 16>'``); ``options`` are NVRTC's, beside :data:`OPTIONS`; ``only``
    is the compute capability, such as 90, whose own instructions it uses, 0 where later GPUs have
    them too. The kernel takes one struct, or nothing; its fields are read from the source
    (:func:`parameters`).
    """
    source: str
    name: str
    defines: tuple[tuple[str, int | str], ...] = ()
    options: tuple[str, ...] = ()
    only: int = 0

    def __str__(self) -> str:
        words = [f'{k}={v}' for k, v in self.defines] + list(self.options)
        return f'{Path(self.source).name}: {self.name}' + (f' ({" ".join(words)})' if words else '')


class Binary(NamedTuple):
    """A compiled kernel: mangled name, PTX types of the parameters, NVRTC's log, cubin or PTX."""
    symbol: str
    param_types: tuple[str, ...]
    log: str
    image: bytes


class NvrtcNotFound(RuntimeError):
    """There is no NVRTC that fits the installed torch."""


# --- NVRTC ----------------------------------------------------------------------------------

class CtypesNvrtc:
    """The functions of ``cuda.bindings.nvrtc`` that are used here, for a torch that came without
    it: each gives the error's code first, then its results.

    Raises:
        OSError: if the library cannot be loaded.
    """

    _RESULTS = {'nvrtcVersion': (ctypes.c_int, ctypes.c_int),
                'nvrtcGetNumSupportedArchs': (ctypes.c_int,),
                'nvrtcCreateProgram': (ctypes.c_void_p,),
                'nvrtcGetLoweredName': (ctypes.c_char_p,),
                **{f'nvrtcGet{what}Size': (ctypes.c_size_t,)
                   for what in ('ProgramLog', 'PTX', 'CUBIN')}}

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        # NVRTC opens its builtins by name, and pip's folders are not on the loader's path.
        for builtins in Path(path).parent.glob('*nvrtc-builtins*'):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args):
            results = [type_() for type_ in self._RESULTS.get(name, ())]
            args = [(ctypes.c_char_p * len(a))(*a) if isinstance(a, list) else a for a in args]
            to = [ctypes.byref(result) for result in results]
            code = function(*(to + args if name == 'nvrtcCreateProgram' else args + to))
            # A handle as an integer would be cut to 32 bits by the next call.
            return code, *(r if isinstance(r, ctypes.c_void_p) else r.value for r in results)

        return call

    def nvrtcDestroyProgram(self, program: ctypes.c_void_p) -> tuple[int]:
        return self._library.nvrtcDestroyProgram(ctypes.byref(program)),

    def nvrtcGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, self._library.nvrtcGetErrorString(code)

    def nvrtcGetSupportedArchs(self) -> tuple[int, list[int]]:
        code, count = self.nvrtcGetNumSupportedArchs()
        archs = (ctypes.c_int * count)()
        return code or self._library.nvrtcGetSupportedArchs(archs), list(archs)


class Nvrtc:
    """An NVRTC: its ``version`` (major, minor), the ``archs`` that it knows, such as 90.

    Args:
        library: ``cuda.bindings.nvrtc``, or :class:`CtypesNvrtc`.
    """

    def __init__(self, library: Any):
        self._library = library
        self.version = tuple(self._call('Version'))
        archs, = self._call('GetSupportedArchs')
        self.archs = tuple(sorted(archs))

    def _call(self, name: str, *args) -> Sequence:
        code, *results = getattr(self._library, f'nvrtc{name}')(*args)
        if code:
            raise RuntimeError(f'nvrtc{name} failed: {self._error(code)} ({int(code)})')
        return results

    def _error(self, code) -> str:
        return self._library.nvrtcGetErrorString(code)[1].decode()

    def _get(self, name: str, program) -> bytes:
        size, = self._call(f'Get{name}Size', program)
        if not size:
            return b''
        data = bytes(size + 1)  # NVRTC writes into it; Python has bytes of length 1 only once
        self._call(f'Get{name}', program, data)
        return data[:size]

    def compile(self, files: dict[str, bytes], name: str, options: Sequence[str]) -> Binary:
        """Compile the first of ``files``; the others are headers under their include names.

        Raises:
            RuntimeError: with NVRTC's log, if the source has an error.
        """
        (file, source), *headers = files.items()
        program, = self._call('CreateProgram', source, file.encode(), len(headers),
                              [text for _, text in headers],
                              [header.encode() for header, _ in headers])
        try:
            self._call('AddNameExpression', program, name.encode())
            code, = self._library.nvrtcCompileProgram(
                program, len(options), [option.encode() for option in options])
            log = self._get('ProgramLog', program).rstrip(b'\0').decode(errors='replace')
            if code:
                version = '.'.join(map(str, self.version))
                raise RuntimeError(f'{file}: {name} does not compile with {" ".join(options)} '
                                   f'({self._error(code)}, CUDA {version}):\n{log}')
            symbol, = self._call('GetLoweredName', program, name.encode())
            ptx = self._get('PTX', program)
            image = self._get('CUBIN', program) or ptx
        finally:
            self._call('DestroyProgram', program)
        symbol = symbol.decode()
        return Binary(symbol, ptx_param_types(ptx.decode(), symbol), log, image)


def ptx_param_types(ptx: str, symbol: str) -> tuple[str, ...]:
    """The types of a kernel's parameters as PTX has them: 'u64', 'f32', 'b8[24]' for a struct."""
    return tuple(kind + size for kind, size in re.findall(
        rf'^\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s[^,\n]*?\b{re.escape(symbol)}_param_\d+'
        r'(\[\d+\])?', ptx.partition(f'.entry {symbol}(')[2].partition(')')[0], re.MULTILINE))


@functools.lru_cache(maxsize=1)
def find_nvrtc() -> Nvrtc:
    """The NVRTC that belongs to the installed torch; any, if torch was built without CUDA. Through
    ``cuda.bindings``, which torch brings from 2.10 on, else by ctypes.

    Raises:
        NvrtcNotFound: naming what was looked at.
    """
    wanted = torch.version.cuda and int(torch.version.cuda.split('.')[0])
    tried = []
    for name in ('cuda.bindings', *libraries.candidates('nvrtc', [wanted] if wanted else [13, 12])):
        try:
            nvrtc = Nvrtc(_bindings() if name == 'cuda.bindings' else CtypesNvrtc(name))
        except (ImportError, OSError, AttributeError, RuntimeError) as err:
            tried.append(f'{name} ({err})' if os.sep in name else name)
            continue
        if wanted in (None, nvrtc.version[0]):
            return nvrtc
        tried.append(f'{name} (CUDA {nvrtc.version[0]})')
    raise NvrtcNotFound(
        f'no NVRTC library{f" of CUDA {wanted}" if wanted else ""} was found, which compiles the '
        f'CUDA kernels and comes with CUDA builds of torch (this is torch {torch.__version__}): '
        f'looked in cuda.bindings, {libraries.PLACES}; tried: {", ".join(tried)}')


def _bindings() -> Any:
    from cuda.bindings import nvrtc
    return nvrtc


# --- compilation and the disk cache ---------------------------------------------------------

def target(capability: int, archs: Sequence[int]) -> str:
    """The target to compile for on a device of a compute capability such as 90: its own code, or
    PTX for the driver where this NVRTC is older than the chip.

    Raises:
        RuntimeError: if this NVRTC no longer knows so old a chip.
    """
    if capability in archs:
        return f'sm_{capability}'
    older = [arch for arch in archs if arch < capability]
    if not older:
        raise RuntimeError(f'the CUDA of this torch compiles for compute capability '
                           f'{min(archs) / 10} and above, and this GPU has {capability / 10}: '
                           f'install a torch built with an older CUDA, or choose another backend')
    return f'compute_{max(older)}'


_lock = threading.RLock()
_binaries: dict[str, Binary] = {}
_warned = threading.Event()
_cache: Path | None = None


@contextlib.contextmanager
def override_cache(folder: Path | None = None, kernels: Path | None = None) -> Iterator[None]:
    """A context for tests, in which nothing compiled before is remembered, compiled kernels are
    kept in ``folder``, and sources are read from ``kernels``."""
    global KERNELS, _binaries, _warned, _cache
    saved = KERNELS, _binaries, _warned, _cache
    KERNELS, _cache = kernels or KERNELS, folder or _cache
    _binaries, _warned = {}, threading.Event()
    try:
        yield
    finally:
        KERNELS, _binaries, _warned, _cache = saved


def build(instance: Instance, arch: str) -> Binary:
    """Compile for ``'sm_90'`` (machine code) or ``'compute_90'`` (PTX), or take it from the cache.

    Raises:
        NvrtcNotFound: if there is no NVRTC.
        RuntimeError: with NVRTC's log, if the source has an error.
        ValueError: if the kernel takes other parameters than are read from its source.
    """
    nvrtc = find_nvrtc()
    files = read_sources(instance.source)
    options = [f'--gpu-architecture={arch}{"a" if instance.only else ""}', *OPTIONS,
               *instance.options]
    options += [f'--define-macro={name}={value}' for name, value in instance.defines]
    key = cache_key(files, instance.name, options, nvrtc.version)
    with _lock:
        if key not in _binaries:
            binary = _read_cache(key)
            if binary is None:
                binary = nvrtc.compile(files, instance.name, options)
                _write_cache(key, binary)
            _binaries[key] = binary
        binary = _binaries[key]
    check_params(instance, binary)
    return binary


def read_sources(source: str) -> dict[str, bytes]:
    """A source and the headers of ours that it includes, directly or not, by include name, which is
    a path below the kernels folder."""
    path = KERNELS / source
    files = {path.name: path.read_bytes()}
    waiting = [path.name]
    while waiting:
        text = files[waiting.pop()].decode()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            header = KERNELS / name
            if name not in files and header.is_file():  # NVRTC reports a missing one better
                files[name] = header.read_bytes()
                waiting.append(name)
    return files


def parameters(instance: Instance) -> tuple[Field, ...]:
    """The fields of the struct that the kernel takes, as its source says.

    Raises:
        ValueError: if they are not as :func:`fields_of` can read them.
    """
    source = b'\n'.join(read_sources(instance.source).values()).decode()
    return fields_of(source, instance.name)


def cache_key(files: dict[str, bytes], name: str, options: Sequence[str],
              version: tuple[int, int]) -> str:
    """SHA-256 over all that decides the result."""
    sources = {file: hashlib.sha256(text).hexdigest() for file, text in files.items()}
    return hashlib.sha256(json.dumps([sources, name, list(options), version]).encode()).hexdigest()


def check_params(instance: Instance, binary: Binary) -> None:
    """Raise ValueError if the kernel takes other parameters than are read from its source."""
    fields = parameters(instance)
    size = packed_size(fields)
    if binary.param_types != ((f'b8[{size}]',) if fields else ()):
        raise ValueError(f'{instance}: its struct is read as one of {size} bytes, but the kernel '
                         f'takes {" ".join(binary.param_types) or "nothing"}')


def cache_dir() -> Path:
    """The folder of the compiled kernels on disk.

    Raises:
        RuntimeError: if no variable is set and there is no home folder.
    """
    if _cache is not None:
        return _cache
    if folder := os.environ.get('VMAMBA_MM_CACHE_DIR'):
        return Path(folder).expanduser()
    if caches := os.environ.get('XDG_CACHE_HOME'):
        return Path(caches, 'vmamba_mm')
    return Path.home() / '.cache' / 'vmamba_mm'


def _read_cache(key: str) -> Binary | None:
    """None for an entry that is absent, unreadable, truncated or otherwise damaged."""
    try:
        data = (cache_dir() / f'{key}.kernel').read_bytes()
    except (OSError, RuntimeError):
        return None
    start = len(CACHE_MAGIC) + 32
    if data[:start] != CACHE_MAGIC + _digest(key, data[start:]):
        return None
    head, _, image = data[start:].partition(b'\n')
    symbol, param_types, log = json.loads(head)
    return Binary(symbol, tuple(param_types), log, image)


def _write_cache(key: str, binary: Binary) -> None:
    body = json.dumps(binary[:3]).encode() + b'\n' + binary.image
    try:
        write_atomic(CACHE_MAGIC + _digest(key, body) + body, cache_dir() / f'{key}.kernel')
    except (OSError, RuntimeError) as err:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(f'compiled CUDA kernels cannot be kept ({err}), so each process compiles '
                          'them again: set VMAMBA_MM_CACHE_DIR to a folder that can be written',
                          RuntimeWarning, stacklevel=2)


def _digest(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()
