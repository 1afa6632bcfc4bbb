"""The CUDA kernels on a CPU: what they calculate is then tested on machines without a GPU.

The C++ compiler takes a kernel's source as it is, but for two things: an ``asm`` statement becomes
a call of a function with the name of its instruction, and dynamic shared memory a pointer.
``emulated_cuda.h`` has those functions, CUDA's built-ins, and a fiber for each thread of a cluster.
The launches are the real ones.

Of mistakes that results on a GPU may not show, these are found: dynamic shared memory is NaN until
it is written, and a copy in the background comes as late as it may; threads that wait for ever and
writes beyond dynamic shared memory are errors; :attr:`Kernel.seed` changes the order of threads, so
that a race changes the result. Accesses of global memory are not checked.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmamba_mm.ops.core import backends, compile, gemm, graphs, launch
from vmamba_mm.ops.core.parameters import bind_fields, packed_size
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.ss2d_scan import large_state

HEADER = Path(__file__).with_name('emulated_cuda.h')
COMPILER = shutil.which('c++') or shutil.which('g++')  # None: there is none
#: Without one tests are skipped, but not in CI.
IS_MISSING = sys.platform != 'linux' or COMPILER is None and not os.environ.get('CI')
NEEDS_COMPILER = pytest.mark.skipif(IS_MISSING, reason='needs Linux and a C++ compiler')
# Few multiprocessors, so that small inputs are cut as large ones are on a GPU.
PROPERTIES = dict(multi_processor_count=4, shared_memory_per_multiprocessor=228 * 1024,
                  shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20)
WHY_NOT = scans.why_not  # the real one


def translate(source: str) -> str:
    """Preprocessed CUDA to C++ for ``emulated_cuda.h``."""
    source = re.sub(r'extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];',
                    r'\1 *const \2 = (\1 *)dynamic_shared;', source)
    parts, end = [], 0
    for match in re.finditer(r'\basm(?: volatile)?\(', source):
        parts.append(source[end:match.start()])
        end = closing(source, match.end())
        parts.append(call_of(source[match.end():end - 1]))
    return ''.join([*parts, source[end:]])


def closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes one before ``start``."""
    depth = 1
    for match in re.compile('[()]').finditer(text, start):
        depth += 1 if match[0] == '(' else -1
        if depth == 0:
            return match.end()
    raise ValueError(f'no closing parenthesis after {text[start:start + 40]!r}')


def call_of(statement: str) -> str:
    """What is within ``asm(...)``, as a call; a statement for the optimiser alone does nothing."""
    code, operands = re.match(r'((?:\s*"[^"]*")+)(.*)', statement, re.DOTALL).groups()
    code = ''.join(re.findall('"([^"]*)"', code))
    names = re.findall(r'(?:^|[;:{])\s*([a-z]\w*(?:\.\w+)+)', code)
    if not names:
        return '(void)0'
    values = [operands[match.end():closing(operands, match.end()) - 1]
              for match in re.finditer(r'"[=+]?\w"\s*\(', operands)]
    arguments = [values[int(number[1:])] if number[0] == '%' else number
                 for number in re.findall(r'%\d+|(?<![\w.])\d+\b', code)]
    return f'ptx::{"__".join(names).replace(".", "_")}({", ".join(arguments)})'


class Kernel:
    """In place of :class:`vmamba_mm.ops.core.launch.Kernel`."""

    seed = 0  # of the order in which blocks, warps and lanes run

    def __init__(self, instance: launch.Instance, library: Path):
        self.instance = instance
        self.fields = compile.parameters(instance)
        self._lib = ctypes.CDLL(str(library))
        self._lib.launch.restype = ctypes.c_char_p
        self._size = packed_size(self.fields)
        self._cluster = max(1, dict(instance.defines).get('CLUSTER', 1))
        if self._lib.params_size() != self._size:
            raise ValueError(f'{instance}: its parameters are a struct of {self._size} bytes, but '
                             f'the kernel takes {self._lib.params_size()}')

    def bind(self, grid, block, shared=0, per_call=(), **constants):
        if shared > PROPERTIES['shared_memory_per_block_optin'] or max(grid[1:]) > 65535:
            raise RuntimeError(f'{self.instance}: no launch of {grid} with {shared} bytes')

        def start(packed):
            error = self._lib.launch(packed, *grid, *block, shared, self.seed,
                                     self._cluster)
            if error:
                raise RuntimeError(f'{self.instance}, grid {grid}, block {block}: '
                                   f'{error.decode()}')

        return bind_fields(self.fields, start, self.instance, per_call, constants)

    def clusters(self, cluster, threads, shared):
        blocks = PROPERTIES['shared_memory_per_multiprocessor'] // (shared + 1024)
        return PROPERTIES['multi_processor_count'] * blocks // cluster


def build(instance: launch.Instance, arch: str, folder: Path) -> Path:
    """In place of :func:`vmamba_mm.ops.core.compile.build`: a shared library in ``folder``, which
    other processes may use too."""
    library = folder / (re.sub(r'\W+', '_', f'{instance} {arch}') + '.so')
    if library.exists():
        return library
    defines = [f'-D{name}={value}' for name, value in
               (*instance.defines, ('__CUDA_ARCH__', f'{arch.removeprefix("sm_")}0'))]
    source = run_compiler('-E', *defines, f'-I{compile.KERNELS}',
                          str(compile.KERNELS / instance.source))
    name = f'({instance.name})'
    source = '\n'.join((
        f'#include "{HEADER}"', translate(source), 'static const void *given;',
        f'static void call() {{ emulated::call_kernel({name}, given); }}',
        f'EXPORT int params_size() {{ return emulated::size_of_params({name}); }}',
        'EXPORT const char *launch(const void *params, u32 x, u32 y, u32 z, u32 block_x, '
        'u32 block_y, u32 block_z, int shared, u32 seed, int cluster) {',
        '    given = params;',
        '    return emulated::launch(call, {x, y, z}, {block_x, block_y, block_z}, shared, seed, '
        'cluster);',
        '}'))
    # C's own headers take half the time of those that C++ wraps around them.
    own = library.with_suffix(f'.{os.getpid()}')
    run_compiler('-std=c++17', '-O1', '-nostdinc++', '-fno-strict-aliasing', '-shared', '-fPIC',
                 '-fvisibility=hidden', '-U_FORTIFY_SOURCE',
                 '-DEXPORT=extern "C" __attribute__((visibility("default")))',
                 '-o', str(own), '-', text=source)
    return own.replace(library)


def run_compiler(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run([COMPILER or 'c++', '-w', '-x', 'c++', *arguments], input=text,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{" ".join(done.args)}:\n{done.stderr[:5000]}')
    return done.stdout


def product(index, dtype, out_dtype, rows, columns, inner, left_t=False, right_t=False, bias=False,
            tf32=False, pitches=(0, 0, 0), batch=1):
    """In place of :func:`vmamba_mm.ops.core.gemm.product`; leaves NaN in its workspace."""
    def matrices(address, height, width, dtype, pitch=0):
        pitch = pitch or width
        size = ((batch * height - 1) * pitch + width) * dtype.itemsize
        memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
        return memory.as_strided((batch, height, width), (height * pitch, pitch, 1))

    def run(left, right, out, workspace, *bias):
        left = (matrices(left, inner, rows, dtype, pitches[0]).mT if left_t
                else matrices(left, rows, inner, dtype, pitches[0]))
        right = (matrices(right, columns, inner, dtype, pitches[1]).mT if right_t
                 else matrices(right, inner, columns, dtype, pitches[1]))
        result = left.float() @ right.float()
        if bias:
            result += matrices(*bias, 1, columns, dtype)
        matrices(out, rows, columns, out_dtype, pitches[2]).copy_(result)
        memory = (ctypes.c_char * 256).from_address(workspace)
        torch.frombuffer(memory, dtype=torch.float32).fill_(torch.nan)

    return gemm.Product(run, 256)


@contextlib.contextmanager
def emulated_gpu(folder: Path, capability: tuple[int, int] = (9, 0)):
    """Ops take tensors of the CPU for those of a GPU of this compute capability; ``folder`` keeps
    what is compiled."""
    properties = SimpleNamespace(major=capability[0], **PROPERTIES)
    arch = f'sm_{10 * capability[0] + capability[1]}'

    def load(instance, index):
        return Kernel(instance, build(instance, arch, folder))

    with launch.override_loader(load), pytest.MonkeyPatch.context() as patch:
        for target, name, value in (
                (torch.cuda, 'get_device_capability', lambda *_: capability),
                (torch.cuda, 'get_device_properties', lambda *_: properties),
                (gemm, 'product', product), (gemm, 'why_not', lambda: None),
                (graphs, 'is_current_stream_capturing', lambda: True),  # there are no graphs
                (backends, 'KERNEL_DEVICES', ('cpu',)),
                (scans, 'why_not', why_not), (large_state, 'why_not', why_not)):
            patch.setattr(target, name, value)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for so little work, others only wait for a core
        yield
        torch.set_num_threads(threads)


@contextlib.contextmanager
def with_kernels(where, compiled):
    """The device of tensors, in a context where kernels run on it: 'cuda'; or 'cpu', where they are
    emulated as of an sm_75 or, else, an sm_90, with files in the folder ``compiled``."""
    if where == 'cuda':
        yield 'cuda'
    else:
        if IS_MISSING:
            pytest.skip('needs Linux and a C++ compiler')
        with emulated_gpu(compiled, (7, 5) if where == 'sm_75' else (9, 0)):
            yield 'cpu'


CUDA = pytest.param('cuda', marks=pytest.mark.gpu(nvidia=True))


class OnGpu:
    """A tensor as a GPU's; a class that Dynamo can trace."""
    is_cuda, device = True, torch.device('cuda', 0)

    def __init__(self, tensor):
        self.dtype, self.shape, self.numel = tensor.dtype, tensor.shape, tensor.numel


def why_not(tensor, rank, state):
    """What the op says to such a tensor on a GPU."""
    return WHY_NOT(OnGpu(tensor), rank, state)
