import contextlib
import ctypes
import hashlib
import os
import struct
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from vmamba_mm.ops.core import nvrtc
from vmamba_mm.ops.core.nvrtc import Instance

ARCHS = (75, 80, 86, 89, 90, 100, 120)
SOURCE = r'''
#include "add.cuh"

struct Add {
    float *out;
    const float *a, *b;
    int n;
};

extern "C" __global__ void add(const Add p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n) p.out[i] = plus(p.a[i], p.b[i]) * SCALE;
}

// Every kind of field. The 4-byte one before the 8-byte one makes a hole.
template <typename T>
struct Kinds {
    T *out;
    int i;
    long long q;
    float f;
    double d;
    int last;
};

template <typename T, int N>
__global__ void kinds(const __grid_constant__ Kinds<T> p) {
    T values[] = {T(p.i), T(p.q), T(p.f), T(p.d), T(p.last), T(N)};
    if (threadIdx.x < 6) p.out[threadIdx.x] = values[threadIdx.x];
}

struct Reverse {
    float *x;
    int spread;
};

// Reverses a block's elements through dynamic shared memory, spread over all of it.
__global__ void reverse(const Reverse p) {
    extern __shared__ float dynamic[];
    dynamic[threadIdx.x * p.spread] = p.x[threadIdx.x];
    __syncthreads();
    p.x[threadIdx.x] = dynamic[(blockDim.x - 1 - threadIdx.x) * p.spread];
}

__global__ void nothing() {}

__global__ void loose(float *out, int n) {}
'''
HEADER = '''#pragma once
#include "plus.cuh"
'''
INNER = '__device__ inline float plus(float a, float b) { return a + b; }\n'


def has_nvrtc() -> bool:
    with contextlib.suppress(nvrtc.NvrtcNotFound):
        return bool(nvrtc.find_nvrtc())
    return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason='this torch came without NVRTC')
needs_gpu = pytest.mark.gpu(nvidia=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A kernels folder and an empty cache; nothing compiled before is remembered."""
    for name, text in (('add.cu', SOURCE), ('add.cuh', HEADER), ('plus.cuh', INNER)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(nvrtc, 'KERNELS', tmp_path)
    monkeypatch.setenv('VMAMBA_MM_CACHE_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(nvrtc, '_binaries', {})
    monkeypatch.setattr(nvrtc, '_kernels', {})
    monkeypatch.setattr(nvrtc, '_warned', threading.Event())
    return tmp_path


def instance(name='add', params='PPPi', scale='1.f', options=()):
    return Instance('add.cu', name, params, (('SCALE', scale),), options)


KINDS = instance('kinds<double, 7>', 'Piqfdi')


@pytest.fixture
def compilations(monkeypatch):
    """The names compiled by NVRTC, as they happen."""
    names, compile_ = [], nvrtc.Nvrtc.compile

    def counted(self, files, name, options):
        names.append(name)
        return compile_(self, files, name, options)

    monkeypatch.setattr(nvrtc.Nvrtc, 'compile', counted)
    return names


# --- compilation ----------------------------------------------------------------------------

@needs_nvrtc
@pytest.mark.parametrize('arch', ARCHS)
def test_compiles_for(arch, folder):
    if arch not in nvrtc.find_nvrtc().archs:
        pytest.skip(f'NVRTC {nvrtc.find_nvrtc().version} does not know sm_{arch}')
    binary = nvrtc.build(KINDS, f'sm_{arch}')
    assert binary.image.startswith(b'\x7fELF') and binary.symbol.startswith('_Z5kinds')
    assert binary.param_types == ('b8[48]',)  # 44 and padding


@needs_nvrtc
def test_ptx_for_a_virtual_arch(folder):
    binary = nvrtc.build(instance(), 'compute_80')
    assert b'.target sm_80' in binary.image and binary.image.endswith(b'\0')
    assert binary.symbol == 'add'  # extern "C": the name as it is


@needs_nvrtc
@pytest.mark.parametrize('name, text, said', [
    ('add', SOURCE.replace('blockIdx.x', 'blockIdx.x %d x'), r'add.cu\(11\): error'),
    ('ad', SOURCE, 'identifier "ad" is undefined'),
    ('add', SOURCE.replace('add.cuh', 'absent.cuh'), 'cannot open source file "absent.cuh"')])
def test_errors_come_with_the_log(name, text, said, folder):
    (folder / 'add.cu').write_text(text)
    with pytest.raises(RuntimeError, match=said):
        nvrtc.build(instance(name), 'sm_80')
    assert not (folder / 'cache').exists()


@needs_nvrtc
def test_an_unknown_option_is_an_error(folder):
    with pytest.raises(RuntimeError, match='--nonsense'):
        nvrtc.build(instance(options=('--nonsense',)), 'sm_80')


@needs_nvrtc
@pytest.mark.parametrize('name, params, said', [
    ('add', 'PPP', r'params=.PPP., a struct of 24 bytes, but the kernel takes b8\[32\]'),
    ('add', '', r'the kernel takes b8\[32\]'),
    ('add', 'PPPx', 'letters Pqifd only'),
    ('nothing', 'P', 'takes nothing'),
    ('loose', 'Pi', 'the kernel takes u64 u32')])
def test_params_are_checked(name, params, said, folder):
    with pytest.raises(ValueError, match=said):
        nvrtc.build(instance(name, params), 'sm_80')


def test_packing_is_that_of_c():
    class Fields(ctypes.Structure):
        _fields_ = [('a', ctypes.c_float), ('b', ctypes.c_void_p), ('c', ctypes.c_int),
                    ('d', ctypes.c_double), ('e', ctypes.c_int64), ('f', ctypes.c_int)]

    assert nvrtc.packed_size('fPidqi') == ctypes.sizeof(Fields)
    packed = struct.pack('@fPidqi', 0.5, 2**63, -1, 0.1, -2**40, 7)
    found = Fields.from_buffer_copy(packed.ljust(ctypes.sizeof(Fields)))
    assert [getattr(found, name) for name, _ in Fields._fields_] == [
        0.5, 2**63, -1, 0.1, -2**40, 7]


def test_target_is_own_code_or_ptx_of_the_nearest_older_arch():
    assert nvrtc.target(90, (75, 80, 90)) == 'sm_90'
    assert nvrtc.target(89, (75, 80, 90)) == 'compute_80'
    assert nvrtc.target(120, (75, 80, 90)) == 'compute_90'
    with pytest.raises(RuntimeError, match='7.5 and above, and this GPU has 7.0'):
        nvrtc.target(70, (75, 80, 90))


# --- finding NVRTC --------------------------------------------------------------------------

def test_without_nvrtc_the_error_says_where_it_looked(monkeypatch):
    monkeypatch.setattr(nvrtc, '_nvrtc_candidates', lambda major: iter(['/nowhere/libnvrtc.so']))
    with pytest.raises(nvrtc.NvrtcNotFound, match='nvidia.*torch/lib.*CUDA_HOME.*/nowhere/libnv'):
        nvrtc.find_nvrtc.__wrapped__()


@needs_nvrtc
def test_nvrtc_of_another_cuda_is_refused(monkeypatch):
    version = nvrtc.find_nvrtc().version
    monkeypatch.setattr(torch.version, 'cuda', f'{version[0] + 1}.0')
    with pytest.raises(nvrtc.NvrtcNotFound, match=rf'libnvrtc\S* \(CUDA {version[0]}\)'):
        nvrtc.find_nvrtc.__wrapped__()


@needs_nvrtc
def test_nvrtc_is_found_before_torch_has_loaded_it(monkeypatch):
    path = nvrtc.find_nvrtc().path
    monkeypatch.setattr(nvrtc, 'loaded_libraries', lambda: [])
    found = [os.path.realpath(p) for p in nvrtc._nvrtc_candidates(None) if os.sep in p]
    assert os.path.realpath(path) in found and not any('alt' in p for p in found)


@needs_nvrtc
def test_nvrtc_finds_its_builtins_in_a_process_without_torch():
    """pip's folders are not on the loader's path; torch happens to load the file, we must too."""
    code = ('import sys, types; sys.modules["torch"] = t = types.ModuleType("torch")\n'
            't.device = None\n'
            'import vmamba_mm; ops = types.ModuleType("vmamba_mm.ops")\n'
            'ops.__path__ = [vmamba_mm.__path__[0] + "/ops"]; sys.modules["vmamba_mm.ops"] = ops\n'
            'from vmamba_mm.ops.core import nvrtc\n'
            'n = nvrtc.Nvrtc(sys.argv[1])\n'
            'print(n.compile({"k.cu": b"__global__ void k() {}"}, "k", []).symbol)')
    done = subprocess.run([sys.executable, '-c', code, nvrtc.find_nvrtc().path],
                          capture_output=True, text=True)
    assert done.stdout.strip() == '_Z1kv', done.stderr


# --- cache ----------------------------------------------------------------------------------

@needs_nvrtc
def test_a_second_process_does_not_compile(folder, compilations, monkeypatch):
    first = nvrtc.build(KINDS, 'sm_80')
    nvrtc._binaries.clear()
    assert nvrtc.build(KINDS, 'sm_80') == first
    assert len(compilations) == 1


@needs_nvrtc
@pytest.mark.parametrize('damage', [
    lambda data: b'', lambda data: data[:20], lambda data: data[:-1], lambda data: data + b'x',
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], lambda data: bytes(len(data))],
    ids=['empty', 'header', 'truncated', 'longer', 'bit', 'zeros'])
def test_a_damaged_entry_is_compiled_again(damage, folder, compilations):
    first = nvrtc.build(KINDS, 'sm_80')
    entry, = (folder / 'cache').iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    nvrtc._binaries.clear()
    assert nvrtc.build(KINDS, 'sm_80') == first
    assert len(compilations) == 2 and entry.read_bytes() == good


@needs_nvrtc
def test_an_entry_under_another_name_is_damaged(folder, compilations):
    nvrtc.build(instance(scale='2.f'), 'sm_80')
    entry, = (folder / 'cache').iterdir()
    nvrtc.build(instance(scale='3.f'), 'sm_80')
    other, = set((folder / 'cache').iterdir()) - {entry}
    other.write_bytes(entry.read_bytes())
    nvrtc._binaries.clear()
    nvrtc.build(instance(scale='3.f'), 'sm_80')
    assert len(compilations) == 3


@needs_nvrtc
def test_each_ingredient_compiles_anew(folder, compilations, monkeypatch):
    nvrtc.build(instance(), 'sm_80')
    nvrtc.build(instance('nothing', ''), 'sm_80')
    nvrtc.build(instance(scale='2.f'), 'sm_80')
    nvrtc.build(instance(options=('--use_fast_math',)), 'sm_80')
    nvrtc.build(instance(), 'sm_90')
    nvrtc.build(instance(), 'compute_90')
    for name, text in (('add.cu', SOURCE), ('add.cuh', HEADER), ('plus.cuh', INNER)):
        (folder / name).write_text(text + '\n')
        nvrtc.build(instance(), 'sm_80')
    monkeypatch.setattr(nvrtc.find_nvrtc(), 'version', (99, 0))
    nvrtc.build(instance(), 'sm_80')
    assert len(compilations) == len(list((folder / 'cache').iterdir())) == 10
    nvrtc.build(instance(), 'sm_80')
    assert len(compilations) == 10


@needs_nvrtc
def test_threads_compile_once(folder, compilations):
    results = []
    threads = [threading.Thread(target=lambda: results.append(nvrtc.build(KINDS, 'sm_80')))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == len(compilations) == 1


@needs_nvrtc
def test_several_processes_at_once(folder):
    code = ('import hashlib, sys\n'
            'from pathlib import Path\n'
            'from vmamba_mm.ops.core import nvrtc\n'
            'nvrtc.KERNELS = Path(sys.argv[1])\n'
            'i = nvrtc.Instance("add.cu", "kinds<double, 7>", "Piqfdi", (("SCALE", "1.f"),))\n'
            'print(hashlib.sha256(nvrtc.build(i, "sm_80").image).hexdigest())')
    running = [subprocess.Popen([sys.executable, '-W', 'error', '-c', code, str(folder)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    done = [process.communicate() for process in running]
    image = nvrtc.build(KINDS, 'sm_80').image
    assert {out.strip() for out, _ in done} == {hashlib.sha256(image).hexdigest()}, done
    assert len(list((folder / 'cache').iterdir())) == 1


@needs_nvrtc
def test_without_a_writable_folder_it_works_and_warns_once(folder, monkeypatch):
    monkeypatch.setenv('VMAMBA_MM_CACHE_DIR', str(folder / 'add.cu' / 'cache'))
    with pytest.warns(RuntimeWarning, match='VMAMBA_MM_CACHE_DIR'):
        nvrtc.build(KINDS, 'sm_80')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        nvrtc.build(instance(), 'sm_80')


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.delenv('VMAMBA_MM_CACHE_DIR', raising=False)
    assert nvrtc.cache_dir() == tmp_path / '.cache/vmamba_mm'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert str(nvrtc.cache_dir()) == '/x/vmamba_mm'
    monkeypatch.setenv('VMAMBA_MM_CACHE_DIR', '~/own')
    assert nvrtc.cache_dir() == tmp_path / 'own'


# --- launches, with a driver that only takes notes ------------------------------------------

class FakeDriver:
    """Notes launches and what their arguments point to; ``codes`` are the next results."""

    def __init__(self):
        self.launches, self.calls, self.codes = [], [], []

    def cuLaunchKernel(self, function, *rest):
        *numbers, stream, pointers, extra = rest
        start = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))[0]
        kinds = struct.Struct(f'@{KINDS.params}')
        values = kinds.unpack(ctypes.string_at(start, kinds.size))
        self.launches.append((numbers, stream.value, values))
        return self.codes.pop(0) if self.codes else 0

    def cuGetErrorName(self, code, out):
        out._obj.value = b'CUDA_ERROR_SOMETHING'

    def cuGetErrorString(self, code, out):
        out._obj.value = b'something went wrong'

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            return 0
        return call


@pytest.fixture
def fake(monkeypatch):
    driver, entered = FakeDriver(), []

    @contextlib.contextmanager
    def current(index):
        entered.append(index)
        yield

    driver.entered = entered
    monkeypatch.setattr(nvrtc, '_driver', lambda: driver)
    monkeypatch.setattr(nvrtc, 'current', current)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda i: 1000 + i, raising=False)
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: 1, raising=False)
    return driver


BINARY = nvrtc.Binary('k', ('b8[48]',), '', b'')
ARGS = (2**64 - 1, -3, -2**40, 0.5, 0.1, 9)


def test_launch_packs_every_kind_of_argument(fake):
    kernel = nvrtc.Kernel(KINDS, 1, BINARY)
    fake.entered.clear()
    kernel.launch((2, 3, 4), (32, 1, 1), ARGS, 256)
    assert fake.launches == [([2, 3, 4, 32, 1, 1, 256], 1001, ARGS)]
    assert not fake.entered


def test_launch_where_no_context_or_another_device_is_current(fake):
    kernel, other = nvrtc.Kernel(KINDS, 1, BINARY), nvrtc.Kernel(KINDS, 0, BINARY)
    fake.entered.clear()
    fake.codes = [nvrtc.CUDA_ERROR_INVALID_CONTEXT]
    kernel.launch((1, 1, 1), (1, 1, 1), ARGS)
    assert fake.entered == [1] and len(fake.launches) == 2
    other.launch((1, 1, 1), (1, 1, 1), ARGS)
    assert fake.entered == [1, 0] and [stream for _, stream, _ in fake.launches[2:]] == [1000]


def test_a_failed_launch_raises_the_drivers_words(fake):
    kernel = nvrtc.Kernel(KINDS, 1, BINARY)
    fake.codes = [1]
    with pytest.raises(RuntimeError, match=r'kinds<double, 7>.*something went wrong \(CUDA_ERROR'):
        kernel.launch((1, 1, 1), (1, 1, 1), ARGS)


@pytest.mark.parametrize('args', [ARGS[:-1], (*ARGS, 1), (0, 2**31, 0, 0, 0, 0),
                                  (0, 1.5, 0, 0, 0, 0), (None, *ARGS[1:])])
def test_wrong_arguments_raise(args, fake):
    kernel = nvrtc.Kernel(KINDS, 1, BINARY)
    with pytest.raises(nvrtc.struct.error):
        kernel.launch((1, 1, 1), (1, 1, 1), args)
    assert not fake.launches


def test_large_shared_memory_is_allowed_once_for_each_larger_size(fake):
    kernel = nvrtc.Kernel(KINDS, 1, BINARY)
    for size in (48 * 1024, 100_000, 90_000, 100_000, 120_000):
        kernel.launch((1, 1, 1), (1, 1, 1), ARGS, size)
    assert [args[1:] for name, args in fake.calls if name == 'cuFuncSetAttribute'] == [
        (nvrtc.MAX_DYNAMIC_SHARED, 100_000), (nvrtc.MAX_DYNAMIC_SHARED, 120_000)]


def test_load_wants_a_cuda_device():
    with pytest.raises(ValueError, match="device 'cpu'"):
        nvrtc.load(instance(), torch.device('cpu'))


# --- on a GPU -------------------------------------------------------------------------------

def grid_of(n, block=128):
    return ((n + block - 1) // block, 1, 1), (block, 1, 1)


def launch_add(kernel, out, a, b):
    kernel.launch(*grid_of(out.numel()), (out.data_ptr(), a.data_ptr(), b.data_ptr(), out.numel()))


@needs_gpu
def test_gpu_add_of_an_odd_size(folder, compilations):
    a, b = torch.randn(2, 100_003, device='cuda')
    out = torch.zeros(100_004, device='cuda')
    kernel = nvrtc.load(instance(scale='2.f'), a.device)
    launch_add(kernel, out[:-1], a, b)
    assert torch.equal(out[:-1], (a + b) * 2) and out[-1] == 0
    assert nvrtc.load(instance(scale='2.f'), 'cuda') is kernel and len(compilations) == 1


@needs_gpu
def test_gpu_every_kind_of_argument(folder):
    out = torch.zeros(6, device='cuda', dtype=torch.float64)
    nvrtc.load(KINDS, 'cuda').launch((1, 1, 1), (32, 1, 1),
                                     (out.data_ptr(), -3, -2**40, 0.5, 0.1, 9))
    assert out.tolist() == [-3, -2**40, 0.5, 0.1, 9, 7]


@needs_gpu
def test_gpu_ptx_compiled_by_the_driver(folder, monkeypatch):
    major, minor = torch.cuda.get_device_capability()
    monkeypatch.setattr(nvrtc.find_nvrtc(), 'archs', (75,))
    if (major, minor) <= (7, 5):
        pytest.skip('needs a GPU above compute capability 7.5')
    a = torch.randn(1001, device='cuda')
    out = torch.zeros_like(a)
    launch_add(nvrtc.load(instance(), 'cuda'), out, a, a)
    assert torch.equal(out, a + a)
    assert any(binary.image.startswith(b'//') for binary in nvrtc._binaries.values())


@needs_gpu
def test_gpu_attributes_and_occupancy(folder):
    kernel = nvrtc.load(instance('reverse', 'Pi'), 'cuda')
    limits = torch.cuda.get_device_properties(0)
    assert 0 < kernel.registers <= 255 and kernel.local_bytes == kernel.shared_bytes == 0
    assert kernel.max_threads == 1024
    assert kernel.occupancy(256) > kernel.occupancy(256, 60 * 1024) >= 1
    assert kernel.occupancy(1024) * 1024 <= limits.max_threads_per_multi_processor


@needs_gpu
@pytest.mark.parametrize('kib', [1, 48, 64])
def test_gpu_dynamic_shared_memory(kib, folder):
    x = torch.randn(256, device='cuda')
    expected = x.flip(0)
    kernel = nvrtc.load(instance('reverse', 'Pi'), 'cuda')
    kernel.launch((1, 1, 1), (256, 1, 1), (x.data_ptr(), kib), kib * 1024)
    assert torch.equal(x, expected)


@needs_gpu
def test_gpu_too_much_shared_memory_raises(folder):
    x = torch.randn(256, device='cuda')
    kernel = nvrtc.load(instance('reverse', 'Pi'), 'cuda')
    with pytest.raises(RuntimeError, match='1048576 bytes of shared memory for add.cu: reverse'):
        kernel.launch((1, 1, 1), (256, 1, 1), (x.data_ptr(), 1), 2**20)
    kernel.launch((1, 1, 1), (256, 1, 1), (x.data_ptr(), 1), 1024)
    torch.cuda.synchronize()


@needs_gpu
def test_gpu_wrong_block_raises_and_leaves_the_device_usable(folder):
    a = torch.randn(8, device='cuda')
    kernel = nvrtc.load(instance(), 'cuda')
    with pytest.raises(RuntimeError, match='CUDA_ERROR_INVALID_VALUE'):
        kernel.launch((1, 1, 1), (4096, 1, 1), (a.data_ptr(), a.data_ptr(), a.data_ptr(), 8))
    launch_add(kernel, a, a, a)
    torch.cuda.synchronize()


@needs_gpu
def test_gpu_runs_on_the_current_stream(folder):
    kernel = nvrtc.load(instance(), 'cuda')
    a = torch.zeros(1 << 20, device='cuda')
    b = torch.ones_like(a)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the launches must queue behind this
        for _ in range(3):
            launch_add(kernel, a, a, b)
        done = stream.record_event()
    assert not done.query()
    stream.synchronize()
    assert bool((a == 3).all())


@needs_gpu
@pytest.mark.parametrize('loaded', [True, False], ids=['loaded before', 'loaded during capture'])
def test_gpu_graph_capture(loaded, folder):
    made = instance(scale='1.f')
    a = torch.zeros(1003, device='cuda')
    b = torch.ones_like(a)
    if loaded:
        nvrtc.load(made, 'cuda')
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_add(nvrtc.load(made, 'cuda'), a, a, b)
        launch_add(nvrtc.load(made, 'cuda'), a, a, b)
    assert bool((a == 0).all())
    # The graph has its own copy of the arguments.
    launch_add(nvrtc.load(made, 'cuda'), b, b, torch.zeros_like(b))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bool((a == 6).all())


@needs_gpu
def test_gpu_first_work_of_a_new_thread(folder):
    """As in autograd's threads, which have no context of their own."""
    kernel = nvrtc.load(instance(), 'cuda')
    a = torch.ones(1003, device='cuda')
    torch.cuda.synchronize()
    errors = []

    def work():
        try:
            launch_add(kernel, a, a, a)
        except RuntimeError as err:
            errors.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and bool((a == 2).all())


@needs_gpu
def test_gpu_many_threads(folder):
    kernel = nvrtc.load(instance(), 'cuda')
    values = [torch.full((1003,), float(i), device='cuda') for i in range(8)]
    one = torch.ones(1003, device='cuda')
    torch.cuda.synchronize()

    def work(x):
        for _ in range(200):
            launch_add(kernel, x, x, one)

    threads = [threading.Thread(target=work, args=(x,)) for x in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert [x.unique().tolist() for x in values] == [[200.0 + i] for i in range(8)]


@pytest.mark.gpu(nvidia=True, count=2)
def test_gpu_second_device_while_the_first_is_current(folder):
    a = torch.ones(1003, device='cuda:1')
    kernel = nvrtc.load(instance(), a.device)
    launch_add(kernel, a, a, a)
    assert torch.cuda.current_device() == 0
    assert bool((a == 2).all())
    assert nvrtc.load(instance(), 'cuda:0') is not kernel


@needs_gpu
def test_gpu_launch_overhead(folder, capsys):
    kernel = nvrtc.load(KINDS, 'cuda')
    out = torch.zeros(6, device='cuda', dtype=torch.float64)
    args = (out.data_ptr(), 1, 2, 3.0, 4.0, 5)
    best = float('inf')
    for _ in range(20):
        torch.cuda.synchronize()  # few enough launches that the queue never fills
        start = time.perf_counter()
        for _ in range(200):
            kernel.launch((1, 1, 1), (32, 1, 1), args)
        best = min(best, (time.perf_counter() - start) / 200)
    start = time.perf_counter()
    for _ in range(1000):
        nvrtc.load(KINDS, out.get_device())
    look_up = (time.perf_counter() - start) / 1000
    with capsys.disabled():
        print(f'\nlaunch {best * 1e6:.2f} us, look-up {look_up * 1e6:.2f} us')
