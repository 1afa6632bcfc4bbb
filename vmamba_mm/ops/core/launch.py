"""Launches of CUDA kernels by the names of their parameters.

An op says what it launches in three steps::

    def gelu_instance(type_: str) -> Instance:
        return Instance('fused/gelu.cu', f'gelu_map<{type_}>')

    @cached                                   # what depends on sizes and dtypes alone, once
    def gelu_launch(index, dtype, size):
        return kernel(index, gelu_instance, TYPES[dtype]).bind(
            (-(-size // 4096), 1, 1), (256, 1, 1), size=size)

    gelu_launch(x.get_device(), x.dtype, x.numel())(x=pointer(x), y=pointer(y))

The names are those of the fields of the struct that the kernel takes, read from its source once
(:mod:`vmamba_mm.ops.core.parameters` says how nested structs and arrays are named). ``bind`` takes
the numbers, which are packed there; what it gives takes the addresses, and the numbers that differ
from call to call (``per_call=('eps',)``). An address that is not given is null. A field that there
is not, or a number that is missing, raises TypeError by its name: in ``bind``, or for an address in
the call.
"""

import contextlib
import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vmamba_mm.ops.core import driver
from vmamba_mm.ops.core.compile import Binary, Instance, build, find_nvrtc, parameters, target
from vmamba_mm.ops.core.parameters import bind_fields

__all__ = ['CODES', 'TYPES', 'Instance', 'Kernel', 'Slab', 'aligned', 'cached', 'device_limits',
           'forget', 'has_groups_of_warps', 'kernel', 'load', 'override_loader', 'pointer',
           'why_not_beside']

#: dtype -> the type that a template of a kernel is for, and what a field such as ``x_type`` says
TYPES = {torch.float32: 'Float', torch.float16: 'Half', torch.bfloat16: 'BFloat'}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_SHARED_BY_DEFAULT = 48 * 1024
_lock = threading.RLock()


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor, null for None."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Tensors, or None, as kernels and products take them, without gaps and at multiples of 16
    bytes; and their addresses."""
    tensors = list(tensors)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    for i, address in enumerate(addresses):
        if address % 16 or address and not tensors[i].is_contiguous():
            tensors[i] = tensors[i].clone(memory_format=torch.contiguous_format)
            addresses[i] = tensors[i].data_ptr()
    return tensors, addresses


def why_not_beside(x: Tensor, *tensors: Tensor | None) -> str | None:
    """The reason why kernels cannot take ``tensors`` beside ``x``, which they take, or None."""
    device = x.device
    for t in tensors:
        if t is not None:
            if t.device != device:
                return 'the inputs are on different devices'
            if t.dtype not in TYPES:
                return 'an input is neither float32 nor float16 nor bfloat16'
    return None


class Slab:
    """Parts of one piece of memory, each at a multiple of 256 bytes."""

    def __init__(self):
        self.size = 0

    def take(self, count: int, size: int = 4) -> int:
        """The offset of a part of ``count`` elements of ``size`` bytes."""
        at = self.size
        self.size += -(-count * size // 256) * 256
        return at


class Kernel:
    """A kernel on one device.

    ``registers`` a thread, ``local_bytes`` a thread (spills and stack), ``shared_bytes`` (static),
    ``max_threads`` a block.
    """

    def __init__(self, instance: Instance, index: int, binary: Binary):
        self.instance, self.index = instance, index
        self.fields = parameters(instance)
        self._function = driver.load_function(index, binary.image, binary.symbol)
        self.max_threads, self.shared_bytes, self.local_bytes, self.registers = (
            driver.attribute(index, self._function, number) for number in (0, 1, 3, 4))
        self._shared_allowed = _SHARED_BY_DEFAULT - self.shared_bytes

    def bind(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int = 0,
             per_call: Iterable[str] = (), **constants) -> Callable[..., None]:
        """A function that launches blocks of so many threads, with ``shared`` bytes of dynamic
        shared memory, on torch's current stream of the kernel's device; nothing waits or allocates.

        The module's docstring has an example. Tensors go as ``x.data_ptr()`` and must live on the
        kernel's device.

        Args:
            per_call: fields, beside the addresses, that the function takes.
            constants: the values of the other fields.

        Raises:
            RuntimeError: of the function: with the driver's text.
            TypeError: if there is no such field, or one is missing.
            struct.error: if type or range of a value do not fit its field.
        """
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        start = driver.make_launcher(self.index, self._function, grid, block, shared,
                                     str(self.instance))
        return bind_fields(self.fields, start, self.instance, per_call, constants)

    def launch(self, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int = 0,
               **fields) -> None:
        """Launch the kernel once; ``fields`` are all fields of its struct, as for :meth:`bind`."""
        self.bind(grid, block, shared, fields)(**fields)

    def occupancy(self, threads: int, shared: int = 0) -> int:
        """Blocks of so many threads and bytes of dynamic shared memory that a multiprocessor
        holds at once."""
        blocks = ctypes.c_int()
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        with driver.current(self.index):
            driver.call('cuOccupancyMaxActiveBlocksPerMultiprocessor', ctypes.byref(blocks),
                        self._function, threads, shared)
        return blocks.value

    def clusters(self, cluster: int, threads: int, shared: int) -> int:
        """Clusters of so many blocks that the GPU holds at once; a block as for :meth:`occupancy`.
        For GPUs from compute capability 9.0 on."""
        count = ctypes.c_int()
        if shared > self._shared_allowed:
            self._allow_shared(shared)
        # CUlaunchAttribute and CUlaunchConfig.
        attribute = ctypes.create_string_buffer(
            struct.pack('@i4x3I52x', _CLUSTER_DIMENSION, 1, 1, cluster))
        config = struct.pack('@7I4xPPI4x', 1, 1, 4096 * cluster, threads, 1, 1, shared, 0,
                             ctypes.addressof(attribute), 1)
        with driver.current(self.index):
            driver.call('cuOccupancyMaxActiveClusters', ctypes.byref(count), self._function,
                        ctypes.c_char_p(config))
        return count.value

    def _allow_shared(self, size: int) -> None:
        with _lock:
            if size > self._shared_allowed:
                with driver.current(self.index):
                    code = driver.library().cuFuncSetAttribute(
                        self._function, driver.MAX_DYNAMIC_SHARED, size)
                driver.check(code, f'{size} bytes of shared memory for {self.instance}')
                self._shared_allowed = size


# --- the kernels that are loaded ------------------------------------------------------------

def _load_on(instance: Instance, index: int) -> Kernel:
    index = driver.device_index(index)
    capability = torch.cuda.get_device_capability(index)
    arch = target(10 * capability[0] + capability[1], find_nvrtc().archs)
    return Kernel(instance, index, build(instance, arch))


_kernels: dict[tuple[Instance, int], Kernel] = {}
_loader = _load_on


@contextlib.contextmanager
def override_loader(loader: Callable[[Instance, int], Kernel] | None = None) -> Iterator[None]:
    """A context for tests, in which no kernel is loaded yet and ``loader``, if any, loads them."""
    global _kernels, _loader
    saved = _kernels, _loader
    _kernels, _loader = {}, loader or _loader
    forget()
    try:
        yield
    finally:
        _kernels, _loader = saved
        forget()


def load(instance: Instance, device: torch.device | str | int) -> Kernel:
    """The kernel for a CUDA device; compiled by the first call, from then on a look-up, which is
    quickest by the device's index.

    Raises:
        NvrtcNotFound: if there is no NVRTC.
        RuntimeError: with NVRTC's log or the driver's text; also without an NVIDIA GPU.
        ValueError: if ``device`` is no CUDA device, or the kernel takes other parameters than its
            source says.
    """
    index = device if isinstance(device, int) else driver.device_index(device)
    loaded = _kernels.get((instance, index))
    if loaded is None:
        with _lock:
            loaded = _kernels.get((instance, index))
            if loaded is None:
                loaded = _kernels[instance, index] = _loader(instance, index)
    return loaded


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


@cached
def device_limits(index: int) -> tuple[int, int, int]:
    """(multiprocessors, bytes of shared memory of each, of a block at most)."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.multi_processor_count, properties.shared_memory_per_multiprocessor,
            properties.shared_memory_per_block_optin)


def has_groups_of_warps(index: int) -> bool:
    """Whether there are products by groups of four warps, which sm_90 alone has and which NVRTC
    compiles from CUDA 12 on."""
    cuda = torch.version.cuda  # None where tests emulate a GPU
    return (torch.cuda.get_device_capability(index) == (9, 0)
            and (cuda is None or int(cuda.split('.')[0]) >= 12))
