"""Matrix products by cuBLASLt, which every CUDA build of torch has loaded, on addresses.

``torch.mm`` takes three times as long in Python and C++, wants views, and rounds to the dtype of
its inputs.

How this works: :func:`product` describes the matrices to the library once for each size and dtype,
asks it for the algorithm that it expects to be quickest, and gives a function of addresses, which
launches it on torch's current stream. The library's structures are written down here by hand, and
its functions called by ctypes: so only versions of CUDA in :data:`TRIED` are used, with others
:func:`why_not` says so and the ops use torch's products.

How to test a change, or another CUDA: ``tests/ops/test_cublas.py`` on a GPU, products of every kind
against fp64, in threads and in a graph. Then add its major version to :data:`TRIED`.
"""

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from vmamba_mm.ops.core import libraries, torch_private
from vmamba_mm.ops.core.driver import capture_allows_loading, current
from vmamba_mm.ops.core.launch import cached

#: Major versions of CUDA whose cuBLASLt has the interface that is used here.
TRIED = (12, 13)
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # of a product
_EPILOGUE_BIAS = 4
_BATCH, _BATCH_STRIDE = 5, 6  # of a layout
_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # of a preference
_MOST_WORKSPACE = 32 * 2**20  # bytes, as torch has on recent GPUs
_FULL_PRECISION = 3  # parts of a sum are added in place or in fp32, never rounded before
_ALIGNED = 16  # bytes, of every matrix


class _Choice(ctypes.Structure):
    _fields_ = [('algorithm', ctypes.c_uint64 * 8), ('workspace', ctypes.c_size_t),
                ('state', ctypes.c_int), ('waves', ctypes.c_float), ('reserved', ctypes.c_int * 4)]


class Product(NamedTuple):
    """``run`` takes the addresses of left, right, the result, ``workspace`` bytes and, for a
    product with one, the bias."""
    run: Callable[..., None]
    workspace: int


@functools.cache
def cublas() -> ctypes.CDLL | None:
    """cuBLASLt, or None if there is none."""
    for path in libraries.candidates('cublasLt', reversed(TRIED)):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        pointer, number = ctypes.c_void_p, ctypes.c_int
        for name, *types in (
                ('MatmulDescCreate', pointer, number, number),
                ('MatmulDescSetAttribute', pointer, number, pointer, ctypes.c_size_t),
                ('MatrixLayoutCreate', pointer, number, ctypes.c_uint64, ctypes.c_uint64,
                 ctypes.c_int64),
                ('MatrixLayoutSetAttribute', pointer, number, pointer, ctypes.c_size_t),
                ('MatmulPreferenceSetAttribute', pointer, number, pointer, ctypes.c_size_t),
                ('MatmulAlgoGetHeuristic', *[pointer] * 7, number, pointer, pointer),
                ('Matmul', *[pointer] * 14, ctypes.c_size_t, pointer)):
            getattr(library, f'cublasLt{name}').argtypes = types
        library.cublasLtGetStatusString.restype = ctypes.c_char_p
        library.cublasLtGetVersion.restype = ctypes.c_size_t
        return library
    return None


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """The reason why products cannot be made here, or None."""
    if (library := cublas()) is None:
        return 'there is no libcublasLt.so, which CUDA builds of torch have'
    major = library.cublasLtGetVersion() // 10000
    if major not in TRIED:
        return (f'the cuBLASLt of CUDA {major} was never tried, only that of '
                f'{" and ".join(map(str, TRIED))}')
    return None


def _check(status: int, what: str) -> None:
    if status:
        text = cublas().cublasLtGetStatusString(status)
        raise RuntimeError(f'{what} failed: {text.decode()} ({status})')


def _make(name: str, *args) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _check(getattr(cublas(), f'cublasLt{name}')(ctypes.byref(handle), *args), f'cublasLt{name}')
    return handle


def _set(what: str, handle: ctypes.c_void_p, attribute: int, value) -> None:
    name = f'cublasLt{what}SetAttribute'
    _check(getattr(cublas(), name)(handle, attribute, ctypes.byref(value),
                                     ctypes.sizeof(value)), name)


@functools.cache
def _handle(index: int) -> ctypes.c_void_p:
    with current(index), capture_allows_loading():
        return _make('Create')


@cached
def product(index: int, dtype: torch.dtype, out_dtype: torch.dtype, rows: int, columns: int,
            inner: int, left_t: bool = False, right_t: bool = False, bias: bool = False,
            tf32: bool = False, pitches: tuple[int, int, int] = (0, 0, 0), batch: int = 1
            ) -> Product:
    """``left`` (rows, inner) times ``right`` (inner, columns), plus ``bias`` (columns), of which a
    transposed one lies there as (inner, rows) or (columns, inner).

    Matrices have no gaps, but where one of the ``pitches`` of left, right and result is not 0:
    then its rows lie that many elements apart. A ``batch`` of products has its matrices one after
    the other, each with as many elements as its rows take. Sums are in fp32 and rounded once;
    ``tf32`` rounds factors in fp32 to that. Every address is a multiple of 16.

    Raises:
        RuntimeError: with the library's words, if it cannot.
    """
    matmul, set_attribute = cublas().cublasLtMatmul, cublas().cublasLtMatmulDescSetAttribute
    # The library's matrices have columns one after the other: to it, all here are transposed.
    descriptor = _make('MatmulDescCreate', _COMPUTE_32F_FAST_TF32 if tf32 else _COMPUTE_32F,
                       _TYPES[torch.float32])
    _set('MatmulDesc', descriptor, _TRANSA, ctypes.c_int(right_t))
    _set('MatmulDesc', descriptor, _TRANSB, ctypes.c_int(left_t))
    if bias:
        _set('MatmulDesc', descriptor, _EPILOGUE, ctypes.c_int(_EPILOGUE_BIAS))
        _set('MatmulDesc', descriptor, _BIAS_POINTER, ctypes.c_void_p(_ALIGNED))

    def layout(type_, height, width, pitch):
        pitch = pitch or width
        made = _make('MatrixLayoutCreate', _TYPES[type_], width, height, pitch)
        if batch > 1:
            _set('MatrixLayout', made, _BATCH, ctypes.c_int(batch))
            _set('MatrixLayout', made, _BATCH_STRIDE, ctypes.c_int64(height * pitch))
        return made

    right_layout = layout(dtype, *((columns, inner) if right_t else (inner, columns)), pitches[1])
    left_layout = layout(dtype, *((inner, rows) if left_t else (rows, inner)), pitches[0])
    out_layout = layout(out_dtype, rows, columns, pitches[2])
    preference = _make('MatmulPreferenceCreate')
    _set('MatmulPreference', preference, _WORKSPACE, ctypes.c_uint64(_MOST_WORKSPACE))
    _set('MatmulPreference', preference, _REDUCTIONS, ctypes.c_uint32(_FULL_PRECISION))
    for attribute in _ALIGNMENTS:
        _set('MatmulPreference', preference, attribute, ctypes.c_uint32(_ALIGNED))
    choice, count = _Choice(), ctypes.c_int()
    with current(index), capture_allows_loading():
        status = cublas().cublasLtMatmulAlgoGetHeuristic(
            _handle(index), descriptor, right_layout, left_layout, out_layout, out_layout,
            preference, 1, ctypes.byref(choice), ctypes.byref(count))
    what = (f'product of ({rows}, {inner}) and ({inner}, {columns}) {dtype} to {out_dtype} by '
            f'cuBLASLt')
    _check(status or choice.state, what)
    cublas().cublasLtMatmulPreferenceDestroy(preference)

    handle, workspace_size = _handle(index), choice.workspace
    one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
    algorithm, lock = ctypes.byref(choice), threading.Lock()
    device, stream = torch_private.current_device, torch_private.current_stream

    def call(left, right, out, workspace):
        return matmul(handle, descriptor, one, right, right_layout, left, left_layout, zero, out,
                      out_layout, out, out_layout, algorithm, workspace, workspace_size,
                      stream(index))

    def run(left, right, out, workspace):
        status = call(left, right, out, workspace) if device() == index else -1
        if status:  # another device, or a new thread
            with current(index):
                _check(call(left, right, out, workspace), what)

    def run_with_bias(left, right, out, workspace, bias):
        with lock:  # the address belongs to the descriptor, which threads share
            _check(set_attribute(descriptor, _BIAS_POINTER,
                                 ctypes.byref(ctypes.c_void_p(bias)), 8), what)
            run(left, right, out, workspace)

    return Product(run_with_bias if bias else run, workspace_size)
