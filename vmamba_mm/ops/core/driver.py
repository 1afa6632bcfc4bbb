"""The CUDA driver: errors, contexts, and modules of compiled kernels.

It is called by ctypes, which every Python has. Only what is called for each launch goes through
``cuda.bindings`` where torch brings it (from 2.10 on): a launch takes 0.5 us of the CPU by it and
0.6 us by ctypes (measured with a driver that does nothing).
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vmamba_mm.ops.core import torch_private
from vmamba_mm.ops.core.libraries import WINDOWS

NAME = 'nvcuda.dll' if WINDOWS else 'libcuda.so.1'
CUDA_ERROR_INVALID_CONTEXT = 201
CAPTURE_MODE_RELAXED = 2
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The driver's functions.

    Raises:
        RuntimeError: without an NVIDIA driver.
    """
    try:
        lib = ctypes.CDLL(NAME)
    except OSError as err:
        raise RuntimeError(f'the NVIDIA driver ({NAME}) cannot be loaded: {err}') from err
    handle = ctypes.c_void_p
    lib.cuModuleLoadData.argtypes = [ctypes.POINTER(handle), ctypes.c_char_p]
    lib.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [
        ctypes.POINTER(ctypes.c_int), handle, ctypes.c_int, ctypes.c_size_t]
    return lib


@functools.lru_cache(maxsize=1)
def bindings() -> Any:
    """``cuda.bindings.driver``, or None where torch came without it."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def call(name: str, *args) -> None:
    """Call a function of the driver; an error raises with the driver's own name and text for it."""
    check(getattr(library(), name)(*args), name)


def check(code: int, what: object) -> None:
    """Raise RuntimeError with the driver's words for an error's ``code``, unless it is 0."""
    if code:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        library().cuGetErrorName(int(code), ctypes.byref(name))
        library().cuGetErrorString(int(code), ctypes.byref(text))
        raise RuntimeError(f'{what} failed: {(text.value or b"unknown error").decode()} '
                           f'({(name.value or b"").decode()}, {int(code)})')


# --- devices --------------------------------------------------------------------------------

def device_index(device: torch.device | str | int) -> int:
    """The number of a CUDA device.

    Raises:
        RuntimeError: if this torch is for AMD's GPUs.
        ValueError: if it is no CUDA device.
    """
    device = torch.device(device)
    if device.type != 'cuda':
        raise ValueError(f'a CUDA kernel cannot run on the device {str(device)!r}')
    if torch.version.hip:
        raise RuntimeError('the CUDA kernels need an NVIDIA GPU; this torch is built for ROCm')
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call('cuDeviceGet', ctypes.byref(device), index)
    call('cuDevicePrimaryCtxRetain', ctypes.byref(context), device)
    return context


@contextlib.contextmanager
def current(index: int) -> Iterator[None]:
    """The device and its primary context current in this thread.

    torch alone does not see to that: in a new thread, as autograd's, device 0 counts as current
    while no context is.
    """
    with torch.cuda.device(index):
        context = ctypes.c_void_p()
        call('cuCtxGetCurrent', ctypes.byref(context))
        if not context:
            call('cuCtxSetCurrent', _primary_context(index))
        yield


@contextlib.contextmanager
def capture_allows_loading() -> Iterator[None]:
    """Loading a module is no work of a stream: let a capture that is under way go on."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    call('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))
    try:
        yield
    finally:
        call('cuThreadExchangeStreamCaptureMode', ctypes.byref(mode))


# --- kernels --------------------------------------------------------------------------------

def load_function(index: int, image: bytes, symbol: str) -> ctypes.c_void_p:
    """A kernel of a compiled module, loaded on a device."""
    function, module = ctypes.c_void_p(), ctypes.c_void_p()
    with current(index), capture_allows_loading():
        call('cuModuleLoadData', ctypes.byref(module), image)
        call('cuModuleGetFunction', ctypes.byref(function), module, symbol.encode())
    return function


def attribute(index: int, function: ctypes.c_void_p, number: int) -> int:
    """A CUfunction_attribute of a kernel."""
    value = ctypes.c_int()
    with current(index):
        call('cuFuncGetAttribute', ctypes.byref(value), number, function)
    return value.value


def make_launcher(index: int, function: ctypes.c_void_p, grid: tuple[int, int, int],
                  block: tuple[int, int, int], shared: int, what: str) -> Callable[[bytes], None]:
    """A function that launches a kernel with the bytes of its struct, on torch's current stream of
    the device, and waits for nothing. ``what`` names the kernel in an error."""
    stream, device = torch_private.current_stream, torch_private.current_device
    sizes = (*grid, *block, shared)
    launch, handle, reference, pointer_to = (
        library().cuLaunchKernel, ctypes.c_void_p, ctypes.byref, ctypes.c_char_p)

    # The driver takes an array with a pointer for each parameter, and copies what they point to.
    def launch_by_ctypes(packed: bytes) -> None:
        values = (function, *sizes, handle(stream(index)), reference(pointer_to(packed)), None)
        code = launch(*values) if device() == index else CUDA_ERROR_INVALID_CONTEXT
        if code:
            if code == CUDA_ERROR_INVALID_CONTEXT:  # another device, or a new thread
                with current(index):
                    code = launch(*values)
            check(code, f'launch of {what}, grid {grid}, block {block}, {shared} bytes of shared '
                        f'memory,')

    if (fast := bindings()) is None:
        return launch_by_ctypes
    launch_fast, fast_function, address = (
        fast.cuLaunchKernel, fast.CUfunction(function.value), ctypes.addressof)

    def launch_by_bindings(packed: bytes) -> None:
        pointer = pointer_to(packed)
        if device() != index or launch_fast(fast_function, *sizes, stream(index), address(pointer),
                                            0)[0]:
            launch_by_ctypes(packed)  # in the right context, or it says what is wrong

    return launch_by_bindings
