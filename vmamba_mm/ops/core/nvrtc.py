"""CUDA kernels compiled where they run: NVRTC of the installed torch, the driver, a disk cache.

Nothing else is needed: no nvcc, no compiler, no headers. Both libraries are called by ctypes.
:func:`load` is what ops use; :func:`build` compiles without a GPU, for CI and tests.

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
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vmamba_mm.atomic import write_atomic
from vmamba_mm.links import KERNELS

OPTIONS = ('--std=c++17', '-lineinfo')
CACHE_MAGIC = b'vmamba_mm kernel 1\n'

CUDA_ERROR_INVALID_CONTEXT = 201
CAPTURE_MODE_RELAXED = 2
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
SHARED_BY_DEFAULT = 48 * 1024


class Instance(NamedTuple):
    """One kernel to compile, hashable.

    ``source`` is a file of the package's kernels folder, ``name`` a kernel's name or a template
    instantiation (``'scan<float, 16>'``). The kernel takes one struct, or nothing; ``params`` has a
    letter for each of its fields: P pointer, i int32, q int64, f float, d double. Its size is
    checked against the compiled kernel. ``options`` are NVRTC's, beside :data:`OPTIONS`.
    """
    source: str
    name: str
    params: str
    defines: tuple[tuple[str, int | str], ...] = ()
    options: tuple[str, ...] = ()

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

class Nvrtc:
    """The library and what it can do: ``version`` (major, minor), ``archs`` such as 90, ``path``.

    Raises:
        OSError: if the library cannot be loaded.
    """

    def __init__(self, path: str):
        self.lib = ctypes.CDLL(path)
        self.path = path
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call('Version', ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value
        self._call('GetNumSupportedArchs', ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call('GetSupportedArchs', archs)
        self.archs = tuple(sorted(archs))
        # NVRTC opens this one by name, and pip's folders are not on the loader's path.
        builtins = Path(path).with_name('libnvrtc-builtins.so.{}.{}'.format(*self.version))
        if builtins.exists():
            ctypes.CDLL(str(builtins))

    def _call(self, name: str, *args) -> None:
        code = getattr(self.lib, f'nvrtc{name}')(*args)
        if code:
            text = self.lib.nvrtcGetErrorString(code).decode()
            raise RuntimeError(f'nvrtc{name} failed: {text} ({code})')

    def _get(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f'Get{name}Size', program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        if size.value:
            self._call(f'Get{name}', program, data)
        return data.raw

    def compile(self, files: dict[str, bytes], name: str, options: Sequence[str]) -> Binary:
        """Compile the first of ``files``; the others are headers under their include names.

        Raises:
            RuntimeError: with NVRTC's log, if the source has an error.
        """
        (file, source), *headers = files.items()
        program, symbol = ctypes.c_void_p(), ctypes.c_char_p()
        strings = ctypes.c_char_p * len(headers)
        self._call('CreateProgram', ctypes.byref(program), source, file.encode(), len(headers),
                   strings(*(text for _, text in headers)),
                   strings(*(header.encode() for header, _ in headers)))
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self._call('AddNameExpression', program, name.encode())
            code = self.lib.nvrtcCompileProgram(program, len(options), array)
            log = self._get('ProgramLog', program).rstrip(b'\0').decode(errors='replace')
            if code:
                reason = self.lib.nvrtcGetErrorString(code).decode()
                version = '.'.join(map(str, self.version))
                raise RuntimeError(f'{file}: {name} does not compile with {" ".join(options)} '
                                   f'({reason}, CUDA {version}):\n{log}')
            self._call('GetLoweredName', program, name.encode(), ctypes.byref(symbol))
            lowered = symbol.value.decode()
            ptx = self._get('PTX', program)
            image = self._get('CUBIN', program) or ptx
        finally:
            self._call('DestroyProgram', ctypes.byref(program))
        return Binary(lowered, ptx_param_types(ptx.decode(), lowered), log, image)


def ptx_param_types(ptx: str, symbol: str) -> tuple[str, ...]:
    """The types of a kernel's parameters as PTX has them: 'u64', 'f32', 'b8[24]' for a struct."""
    return tuple(kind + size for kind, size in re.findall(
        rf'^\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s[^,\n]*?\b{re.escape(symbol)}_param_\d+'
        r'(\[\d+\])?', ptx.partition(f'.entry {symbol}(')[2].partition(')')[0], re.MULTILINE))


@functools.lru_cache(maxsize=1)
def find_nvrtc() -> Nvrtc:
    """The NVRTC that belongs to the installed torch; any, if torch was built without CUDA.

    Raises:
        NvrtcNotFound: naming what was looked at.
    """
    wanted = torch.version.cuda and int(torch.version.cuda.split('.')[0])
    tried = []
    for path in _nvrtc_candidates(wanted):
        try:
            nvrtc = Nvrtc(path)
        except (OSError, AttributeError, RuntimeError) as err:
            tried.append(f'{path} ({err})' if os.sep in path else path)
            continue
        if wanted in (None, nvrtc.version[0]):
            return nvrtc
        tried.append(f'{path} (CUDA {nvrtc.version[0]})')
    raise NvrtcNotFound(
        f'no NVRTC library{f" of CUDA {wanted}" if wanted else ""} was found, which compiles the '
        f'CUDA kernels and comes with CUDA builds of torch (this is torch {torch.__version__}): '
        f'looked for libnvrtc.so among the loaded libraries, in nvidia/*/lib of the Python path, '
        f'torch/lib, {sys.prefix}/lib, CUDA_HOME, CUDA_PATH, /usr/local/cuda, and asked the '
        f'loader; tried: {", ".join(tried) or "nothing"}')


def _nvrtc_candidates(major: int | None) -> Iterator[str]:
    """Paths, then names for the loader; each once."""
    is_nvrtc = re.compile(r'libnvrtc(-[0-9a-f]+)?\.so[.\d]*').fullmatch
    home = Path(torch.__file__).parent
    folders = [folder for root in (home.parent, *map(Path, sys.path))
               for folder in sorted(root.glob('nvidia/*/lib'))]
    folders += [home / 'lib', Path(sys.prefix, 'lib')]
    for root in (os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda'):
        folders += [Path(root, 'lib64'), Path(root, 'lib')] if root else []
    found = loaded_libraries()
    found += [str(file) for folder in folders for file in sorted(folder.glob('libnvrtc*.so*'))]
    yield from dict.fromkeys(path for path in found if is_nvrtc(os.path.basename(path)))
    yield from (f'libnvrtc.so.{n}' for n in ([major] if major else [13, 12]))
    yield 'libnvrtc.so'


def loaded_libraries() -> list[str]:
    with contextlib.suppress(OSError), open('/proc/self/maps') as maps:
        return sorted({line.split(maxsplit=5)[5].rstrip('\n') for line in maps if '.so' in line})
    return []


# --- compilation and the disk cache ---------------------------------------------------------

def target(capability: int, archs: Sequence[int]) -> str:
    """What to compile for on a device of a compute capability such as 90: its own code, or PTX
    for the driver where this NVRTC is older than the chip.

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


def build(instance: Instance, arch: str) -> Binary:
    """Compile for ``'sm_90'`` (machine code) or ``'compute_90'`` (PTX), or take it from the cache.

    Raises:
        NvrtcNotFound: if there is no NVRTC.
        RuntimeError: with NVRTC's log, if the source has an error.
        ValueError: if ``instance.params`` is not what the kernel takes.
    """
    nvrtc = find_nvrtc()
    files = read_sources(KERNELS / instance.source)
    options = [f'--gpu-architecture={arch}', *OPTIONS, *instance.options]
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


def read_sources(path: Path) -> dict[str, bytes]:
    """A source and the headers of ours that it includes, directly or not, by include name."""
    files = {path.name: path.read_bytes()}
    waiting = [path.name]
    while waiting:
        text = files[waiting.pop()].decode()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            header = path.parent / name
            if name not in files and header.is_file():  # NVRTC reports a missing one better
                files[name] = header.read_bytes()
                waiting.append(name)
    return files


def cache_key(files: dict[str, bytes], name: str, options: Sequence[str],
              version: tuple[int, int]) -> str:
    """SHA-256 over all that decides the result."""
    sources = {file: hashlib.sha256(text).hexdigest() for file, text in files.items()}
    return hashlib.sha256(json.dumps([sources, name, list(options), version]).encode()).hexdigest()


def check_params(instance: Instance, binary: Binary) -> None:
    """Raise ValueError if ``instance.params`` is not what the kernel takes."""
    params = instance.params
    if set(params) - set('Pqifd'):
        raise ValueError(f'{instance}: params={params!r} may have the letters Pqifd only')
    size = packed_size(params)
    if binary.param_types != ((f'b8[{size}]',) if params else ()):
        raise ValueError(f'{instance}: params={params!r}, a struct of {size} bytes, but the kernel '
                         f'takes {" ".join(binary.param_types) or "nothing"}')


def packed_size(params: str) -> int:
    """Bytes of a C struct with these fields."""
    widest = max(params, key=struct.calcsize, default='i')
    return struct.calcsize(f'@{params}0{widest}')


def cache_dir() -> Path:
    """Where compiled kernels are kept.

    Raises:
        RuntimeError: if no variable is set and there is no home folder.
    """
    if own := os.environ.get('VMAMBA_MM_CACHE_DIR'):
        return Path(own).expanduser()
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


# --- the driver -----------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL('libcuda.so.1')
    except OSError as err:
        raise RuntimeError(f'the NVIDIA driver (libcuda.so.1) cannot be loaded: {err}') from err
    handle = ctypes.c_void_p
    lib.cuModuleLoadData.argtypes = [ctypes.POINTER(handle), ctypes.c_char_p]
    lib.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [
        ctypes.POINTER(ctypes.c_int), handle, ctypes.c_int, ctypes.c_size_t]
    return lib


def _cuda(name: str, *args) -> None:
    """Call the driver; an error raises with the driver's own name and text for it."""
    _check(getattr(_driver(), name)(*args), name)


def _check(code: int, what: object) -> None:
    if code:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f'{what} failed: {(text.value or b"unknown error").decode()} '
                           f'({(name.value or b"").decode()}, {code})')


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _cuda('cuDeviceGet', ctypes.byref(device), index)
    _cuda('cuDevicePrimaryCtxRetain', ctypes.byref(context), device)
    return context


@contextlib.contextmanager
def current(index: int) -> Iterator[None]:
    """The device and its primary context current in this thread.

    torch alone does not see to that: in a new thread, as autograd's, device 0 counts as current
    while no context is.
    """
    with torch.cuda.device(index):
        context = ctypes.c_void_p()
        _cuda('cuCtxGetCurrent', ctypes.byref(context))
        if not context:
            _cuda('cuCtxSetCurrent', _primary_context(index))
        yield


@contextlib.contextmanager
def capture_allows_loading() -> Iterator[None]:
    """Loading a module is no work of a stream: let a capture that is under way go on."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    _cuda('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))
    try:
        yield
    finally:
        _cuda('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))


class Kernel:
    """A kernel on one device.

    ``registers`` a thread, ``local_bytes`` a thread (spills and stack), ``shared_bytes`` (static),
    ``max_threads`` a block.
    """

    def __init__(self, instance: Instance, index: int, binary: Binary):
        self.instance, self.index = instance, index
        self._function, module = ctypes.c_void_p(), ctypes.c_void_p()
        with current(index), capture_allows_loading():
            _cuda('cuModuleLoadData', ctypes.byref(module), binary.image)
            _cuda('cuModuleGetFunction', ctypes.byref(self._function), module,
                  binary.symbol.encode())
            self.max_threads, self.shared_bytes, self.local_bytes, self.registers = (
                self._attribute(number) for number in (0, 1, 3, 4))
        self._shared_allowed = SHARED_BY_DEFAULT - self.shared_bytes
        self._pack = struct.Struct(f'@{instance.params}').pack
        self._launch = _driver().cuLaunchKernel
        self._stream = torch._C._cuda_getCurrentRawStream
        self._device = torch._C._cuda_getDevice

    def bind(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int = 0
             ) -> Callable[..., None]:
        """A function that launches blocks of so many threads, with ``shared`` bytes of dynamic
        shared memory, on torch's current stream of the kernel's device; nothing waits or allocates.

        It takes numbers, one for each letter of ``instance.params``; tensors go as
        ``x.data_ptr()`` and must live on the kernel's device. It raises struct.error if number,
        type or range of the arguments do not fit, RuntimeError with the driver's text.
        """
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        sizes = (self._function, *grid, *block, shared)
        index, pack, launch = self.index, self._pack, self._launch
        stream, device = self._stream, self._device

        def run(*args):
            # The driver takes an array of a pointer for each parameter, and copies what they
            # point to.
            values = (*sizes, ctypes.c_void_p(stream(index)),
                      ctypes.byref(ctypes.c_char_p(pack(*args))), None)
            code = launch(*values) if device() == index else CUDA_ERROR_INVALID_CONTEXT
            if code:
                if code == CUDA_ERROR_INVALID_CONTEXT:  # another device, or a new thread
                    with current(index):
                        code = launch(*values)
                _check(code, f'launch of {self.instance}, grid {grid}, block {block}, {shared} '
                             f'bytes of shared memory,')

        return run

    def launch(self, grid: tuple[int, int, int], block: tuple[int, int, int], args: Sequence,
               shared: int = 0) -> None:
        """What :meth:`bind` gives, called once."""
        self.bind(grid, block, shared)(*args)

    def occupancy(self, threads: int, shared: int = 0) -> int:
        """Blocks of so many threads and bytes of dynamic shared memory that a multiprocessor
        holds at once."""
        blocks = ctypes.c_int()
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        with current(self.index):
            _cuda('cuOccupancyMaxActiveBlocksPerMultiprocessor', ctypes.byref(blocks),
                  self._function, threads, shared)
        return blocks.value

    def clusters(self, cluster: int, threads: int, shared: int) -> int:
        """Clusters of so many blocks that the GPU holds at once; a block as for :meth:`occupancy`.
        For GPUs from compute capability 9.0 on."""
        found = ctypes.c_int()
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        # CUlaunchAttribute and CUlaunchConfig.
        attribute = ctypes.create_string_buffer(
            struct.pack('@i4x3I52x', CLUSTER_DIMENSION, 1, 1, cluster))
        config = struct.pack('@7I4xPPI4x', 1, 1, 4096 * cluster, threads, 1, 1, shared, 0,
                             ctypes.addressof(attribute), 1)
        with current(self.index):
            _cuda('cuOccupancyMaxActiveClusters', ctypes.byref(found), self._function,
                  ctypes.c_char_p(config))
        return found.value

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        _cuda('cuFuncGetAttribute', ctypes.byref(value), number, self._function)
        return value.value

    def _allow_shared(self, size: int) -> None:
        with _lock:
            if size > self._shared_allowed:
                with current(self.index):
                    code = _driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, size)
                _check(code, f'{size} bytes of shared memory for {self.instance}')
                self._shared_allowed = size


_kernels: dict[tuple[Instance, int], Kernel] = {}


def load(instance: Instance, device: torch.device | str | int) -> Kernel:
    """The kernel for a CUDA device; compiled by the first call, from then on a look-up, which is
    quickest by the device's index.

    Raises:
        NvrtcNotFound: if there is no NVRTC.
        RuntimeError: with NVRTC's log or the driver's text; also without an NVIDIA GPU.
        ValueError: if ``device`` is no CUDA device, or ``instance.params`` is not what the kernel
            takes.
    """
    index = device if isinstance(device, int) else _device_index(device)
    kernel = _kernels.get((instance, index))
    if kernel is None:
        index = _device_index(index)
        with _lock:
            kernel = _kernels.get((instance, index))
            if kernel is None:
                capability = torch.cuda.get_device_capability(index)
                arch = target(10 * capability[0] + capability[1], find_nvrtc().archs)
                kernel = _kernels[instance, index] = Kernel(instance, index, build(instance, arch))
    return kernel


_caches = []


def cached(function: Callable) -> Callable:
    """``functools.lru_cache`` for what depends on sizes, dtypes and the GPU alone, as a bound
    launch; :func:`forget` empties all of them."""
    _caches.append(functools.lru_cache(maxsize=4096)(function))
    return _caches[-1]


def forget() -> None:
    """Empty the caches of :func:`cached`, for tests."""
    for cache in _caches:
        cache.cache_clear()


@cached
def kernel(index: int, instance: Callable[..., Instance], *args) -> Kernel:
    """``load(instance(*args), index)``."""
    return load(instance(*args), index)


def _device_index(device: torch.device | str | int) -> int:
    device = torch.device(device)
    if device.type != 'cuda':
        raise ValueError(f'a CUDA kernel cannot run on the device {str(device)!r}')
    if torch.version.hip:
        raise RuntimeError('the CUDA kernels need an NVIDIA GPU; this torch is built for ROCm')
    return torch.cuda.current_device() if device.index is None else device.index
