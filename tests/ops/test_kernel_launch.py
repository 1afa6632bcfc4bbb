"""Launches by name: the fields that are packed, a driver that takes notes, and a GPU's."""

import contextlib
import ctypes
import struct
import threading
import time

import pytest
import torch
from kernel_folder import KINDS, instance, needs_gpu

from vmamba_mm.ops.core import compile, driver, launch, torch_private
from vmamba_mm.ops.core.parameters import bind_fields, fields_of, packed_size

# --- the fields of a struct -----------------------------------------------------------------

STRUCT = """
struct Map { const void *data; int stride; };  // a comment; with a { in it
constexpr int MOST = 2, LEAST = 1;
template <class T> struct Fields {
    const float *a, *b;  /* one
    and two */
    Map x;
    T *list[MOST];
    int numbers[MOST + 1], n;
    long long q;
    float eps;
};
template <class T> __global__ void __launch_bounds__(32, 1) run(const Fields<T> p) { }
"""


def test_fields_of_a_struct():
    fields = fields_of(STRUCT, 'run<float>')
    assert [field.name for field in fields] == ['a', 'b', 'x_data', 'x_stride', 'list', 'numbers',
                                                'n', 'q', 'eps']
    assert ''.join(field.format for field in fields) == 'PPPiPPiiiiqf'
    with pytest.raises(ValueError, match="no kernel 'scan_rows'"):
        fields_of(STRUCT, 'scan_rows')


def test_packing_is_that_of_c():
    class Fields(ctypes.Structure):
        _fields_ = [('a', ctypes.c_void_p), ('b', ctypes.c_void_p), ('x_data', ctypes.c_void_p),
                    ('x_stride', ctypes.c_int), ('list', ctypes.c_void_p * 2),
                    ('numbers', ctypes.c_int * 3), ('n', ctypes.c_int), ('q', ctypes.c_int64),
                    ('eps', ctypes.c_float)]

    fields, packed = fields_of(STRUCT, 'run<float>'), []
    assert packed_size(fields) == ctypes.sizeof(Fields)
    launch = bind_fields(fields, packed.append, 'run', ('eps', 'n'), dict(
        numbers=(1, -2, 3), q=-2**40, x_stride=7))
    launch(b=2**63, list=(5, 6), eps=0.5, n=-1)
    launch(x_data=8, eps=2, n=9)
    expected = [dict(b=2**63, list=[5, 6], eps=0.5, n=-1), dict(x_data=8, eps=2.0, n=9)]
    for data, given in zip(packed, expected, strict=True):
        found = Fields.from_buffer_copy(data)
        zeros = dict(a=None, b=None, x_data=None, list=[None, None])
        assert {name: list(value) if isinstance(value, ctypes.Array) else value
                for name, _ in Fields._fields_ for value in [getattr(found, name)]} == {
            **zeros, 'numbers': [1, -2, 3], 'q': -2**40, 'x_stride': 7, **given}


@pytest.mark.parametrize('per_call, constants, said', [
    ((), {}, 'kinds<double, 7>.* also needs d, f, i, last, q'),
    (('f', 'd', 'last', 'q'), dict(i=1, width=3), 'has no width'),
    (('f', 'd', 'last', 'q', 'height'), dict(i=1), 'has no height'),
    (('f', 'd', 'last', 'q', 'i'), dict(i=1), 'has as a constant and for each call i')])
def test_unknown_and_missing_fields_raise_at_bind(per_call, constants, said, fake):
    with pytest.raises(TypeError, match=said):
        launch.Kernel(KINDS, 1, BINARY).bind((1, 1, 1), (1, 1, 1), 0, per_call, **constants)


@pytest.mark.parametrize('value', [2**31, 1.5, None], ids=str)
def test_a_constant_that_does_not_fit_raises_at_bind(value, fake):
    with pytest.raises(struct.error):
        launch.Kernel(KINDS, 1, BINARY).bind((1, 1, 1), (1, 1, 1), 0, **dict(NUMBERS, i=value))


# --- launches, with a driver that only takes notes ------------------------------------------

KINDS_FORMAT = struct.Struct('@Piqfdi')


class FakeDriver:
    """Notes launches and what their arguments point to; ``codes`` are the next results."""

    def __init__(self):
        self.launches, self.calls, self.codes, self.by_bindings = [], [], [], 0

    def note(self, numbers, stream, pointers):
        start = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))[0]
        values = KINDS_FORMAT.unpack(ctypes.string_at(start, KINDS_FORMAT.size))
        self.launches.append((numbers, stream, values))
        return self.codes.pop(0) if self.codes else 0

    def cuLaunchKernel(self, function, *rest):
        *numbers, stream, pointers, extra = rest
        return self.note(numbers, stream.value, pointers)

    def cuGetErrorName(self, code, out):
        out._obj.value = b'CUDA_ERROR_SOMETHING'

    def cuGetErrorString(self, code, out):
        out._obj.value = b'something went wrong'

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, args))
            return 0
        return call


class FakeBindings:
    """``cuda.bindings.driver`` in place of the same driver."""

    def __init__(self, driver):
        self.driver = driver

    def CUfunction(self, address):  # noqa: N802
        return address

    def cuLaunchKernel(self, function, *rest):
        *numbers, stream, pointers, extra = rest
        self.driver.by_bindings += 1
        return self.driver.note(numbers, stream, pointers),


@pytest.fixture(params=[True, False], ids=['cuda.bindings', 'ctypes'])
def fake(request, monkeypatch, kernels_folder):
    notes, entered = FakeDriver(), []

    @contextlib.contextmanager
    def current(index):
        entered.append(index)
        yield

    notes.entered = entered
    monkeypatch.setattr(driver, 'library', lambda: notes)
    monkeypatch.setattr(driver, 'bindings', lambda: FakeBindings(notes) if request.param else None)
    monkeypatch.setattr(driver, 'current', current)
    monkeypatch.setattr(torch_private, 'current_stream', lambda i: 1000 + i)
    monkeypatch.setattr(torch_private, 'current_device', lambda: 1)
    return notes


BINARY = compile.Binary('k', ('b8[48]',), '', b'')
NUMBERS = dict(i=-3, q=-2**40, f=0.5, d=0.1, last=9)
ARGS = dict(out=2**64 - 1, **NUMBERS)


def test_launch_packs_every_kind_of_argument(fake, request):
    kernel = launch.Kernel(KINDS, 1, BINARY)
    fake.entered.clear()
    kernel.launch((2, 3, 4), (32, 1, 1), 256, **ARGS)
    kernel.bind((2, 3, 4), (32, 1, 1), 256, **NUMBERS)(out=ARGS['out'])
    assert fake.launches == [([2, 3, 4, 32, 1, 1, 256], 1001, tuple(ARGS.values()))] * 2
    assert not fake.entered
    assert fake.by_bindings == (2 if 'cuda.bindings' in request.node.name else 0)


def test_launch_where_no_context_or_another_device_is_current(fake, request):
    kernel, other = launch.Kernel(KINDS, 1, BINARY), launch.Kernel(KINDS, 0, BINARY)
    fake.entered.clear()
    refusals = 2 if 'cuda.bindings' in request.node.name else 1
    fake.codes = [driver.CUDA_ERROR_INVALID_CONTEXT] * refusals
    kernel.launch((1, 1, 1), (1, 1, 1), **ARGS)
    assert fake.entered == [1] and len(fake.launches) == refusals + 1
    fake.launches.clear()
    other.launch((1, 1, 1), (1, 1, 1), **ARGS)
    assert fake.entered == [1, 0] and [stream for _, stream, _ in fake.launches] == [1000]


def test_a_failed_launch_raises_the_drivers_words(fake):
    kernel = launch.Kernel(KINDS, 1, BINARY)
    fake.codes = [1, 1]
    with pytest.raises(RuntimeError, match=r'kinds<double, 7>.*something went wrong \(CUDA_ERROR'):
        kernel.launch((1, 1, 1), (1, 1, 1), **ARGS)


@pytest.mark.parametrize('change, error', [
    (dict(q=None), TypeError), (dict(width=1), TypeError), (dict(i=2**31), struct.error),
    (dict(i=1.5), struct.error), (dict(out=None), struct.error)], ids=str)
def test_wrong_arguments_raise(change, error, fake):
    call = launch.Kernel(KINDS, 1, BINARY).bind((1, 1, 1), (1, 1, 1), 0, NUMBERS)
    given = {**ARGS, **change}
    if error is TypeError:
        given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(error):
        call(**given)
    assert not fake.launches


def test_large_shared_memory_is_allowed_once_for_each_larger_size(fake):
    kernel = launch.Kernel(KINDS, 1, BINARY)
    for size in (48 * 1024, 100_000, 90_000, 100_000, 120_000):
        kernel.launch((1, 1, 1), (1, 1, 1), size, **ARGS)
    assert [args[1:] for name, args in fake.calls if name == 'cuFuncSetAttribute'] == [
        (driver.MAX_DYNAMIC_SHARED, 100_000), (driver.MAX_DYNAMIC_SHARED, 120_000)]


def test_load_wants_a_cuda_device():
    with pytest.raises(ValueError, match="device 'cpu'"):
        launch.load(instance(), torch.device('cpu'))


# --- on a GPU -------------------------------------------------------------------------------

def grid_of(n, block=128):
    return ((n + block - 1) // block, 1, 1), (block, 1, 1)


def launch_add(kernel, out, a, b):
    kernel.launch(*grid_of(out.numel()), out=out.data_ptr(), a=a.data_ptr(), b=b.data_ptr(),
                  n=out.numel())


@needs_gpu
def test_gpu_add_of_an_odd_size(kernels_folder, compilations):
    a, b = torch.randn(2, 100_003, device='cuda')
    out = torch.zeros(100_004, device='cuda')
    kernel = launch.load(instance(scale='2.f'), a.device)
    launch_add(kernel, out[:-1], a, b)
    assert torch.equal(out[:-1], (a + b) * 2) and out[-1] == 0
    assert launch.load(instance(scale='2.f'), 'cuda') is kernel and len(compilations) == 1


@needs_gpu
def test_gpu_every_kind_of_argument(kernels_folder):
    out = torch.zeros(6, device='cuda', dtype=torch.float64)
    launch.load(KINDS, 'cuda').launch((1, 1, 1), (32, 1, 1), out=out.data_ptr(), **NUMBERS)
    assert out.tolist() == [-3, -2**40, 0.5, 0.1, 9, 7]


@needs_gpu
def test_gpu_ptx_compiled_by_the_driver(kernels_folder, monkeypatch):
    major, minor = torch.cuda.get_device_capability()
    monkeypatch.setattr(compile.find_nvrtc(), 'archs', (75,))
    if (major, minor) <= (7, 5):
        pytest.skip('needs a GPU above compute capability 7.5')
    a = torch.randn(1001, device='cuda')
    out = torch.zeros_like(a)
    launch_add(launch.load(instance(), 'cuda'), out, a, a)
    assert torch.equal(out, a + a)
    assert compile.build(instance(), 'compute_75').image.startswith(b'//')


@needs_gpu
def test_gpu_attributes_and_occupancy(kernels_folder):
    kernel = launch.load(instance('reverse'), 'cuda')
    limits = torch.cuda.get_device_properties(0)
    assert 0 < kernel.registers <= 255 and kernel.local_bytes == kernel.shared_bytes == 0
    assert kernel.max_threads == 1024
    assert kernel.occupancy(256) > kernel.occupancy(256, 60 * 1024) >= 1
    assert kernel.occupancy(1024) * 1024 <= limits.max_threads_per_multi_processor


@needs_gpu
@pytest.mark.parametrize('kib', [1, 48, 64])
def test_gpu_dynamic_shared_memory(kib, kernels_folder):
    x = torch.randn(256, device='cuda')
    expected = x.flip(0)
    kernel = launch.load(instance('reverse'), 'cuda')
    kernel.launch((1, 1, 1), (256, 1, 1), kib * 1024, x=x.data_ptr(), spread=kib)
    assert torch.equal(x, expected)


@needs_gpu
def test_gpu_too_much_shared_memory_raises(kernels_folder):
    x = torch.randn(256, device='cuda')
    kernel = launch.load(instance('reverse'), 'cuda')
    with pytest.raises(RuntimeError, match='1048576 bytes of shared memory for add.cu: reverse'):
        kernel.launch((1, 1, 1), (256, 1, 1), 2**20, x=x.data_ptr(), spread=1)
    kernel.launch((1, 1, 1), (256, 1, 1), 1024, x=x.data_ptr(), spread=1)
    torch.cuda.synchronize()


@needs_gpu
def test_gpu_wrong_block_raises_and_leaves_the_device_usable(kernels_folder):
    a = torch.randn(8, device='cuda')
    kernel = launch.load(instance(), 'cuda')
    with pytest.raises(RuntimeError, match='CUDA_ERROR_INVALID_VALUE'):
        kernel.launch((1, 1, 1), (4096, 1, 1), out=a.data_ptr(), a=0, b=0, n=0)
    launch_add(kernel, a, a, a)
    torch.cuda.synchronize()


@needs_gpu
def test_gpu_runs_on_the_current_stream(kernels_folder):
    kernel = launch.load(instance(), 'cuda')
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
def test_gpu_graph_capture(loaded, kernels_folder):
    made = instance(scale='1.f')
    a = torch.zeros(1003, device='cuda')
    b = torch.ones_like(a)
    if loaded:
        launch.load(made, 'cuda')
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_add(launch.load(made, 'cuda'), a, a, b)
        launch_add(launch.load(made, 'cuda'), a, a, b)
    assert bool((a == 0).all())
    # The graph has its own copy of the arguments.
    launch_add(launch.load(made, 'cuda'), b, b, torch.zeros_like(b))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert bool((a == 6).all())


@needs_gpu
def test_gpu_first_work_of_a_new_thread(kernels_folder):
    """As in autograd's threads, which have no context of their own."""
    kernel = launch.load(instance(), 'cuda')
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
def test_gpu_many_threads(kernels_folder):
    kernel = launch.load(instance(), 'cuda')
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
def test_gpu_second_device_while_the_first_is_current(kernels_folder):
    a = torch.ones(1003, device='cuda:1')
    kernel = launch.load(instance(), a.device)
    launch_add(kernel, a, a, a)
    assert torch.cuda.current_device() == 0
    assert bool((a == 2).all())
    assert launch.load(instance(), 'cuda:0') is not kernel


@needs_gpu
def test_gpu_without_cuda_bindings(kernels_folder, monkeypatch):
    monkeypatch.setattr(driver, 'bindings', lambda: None)
    a = torch.randn(1003, device='cuda')
    out = torch.zeros_like(a)
    launch_add(launch.load(instance(), 'cuda'), out, a, a)
    assert torch.equal(out, a + a)


@needs_gpu
@pytest.mark.parametrize('by_bindings', [True, False], ids=['cuda.bindings', 'ctypes'])
def test_gpu_launch_overhead(by_bindings, kernels_folder, capsys, monkeypatch):
    if not by_bindings:
        monkeypatch.setattr(driver, 'bindings', lambda: None)
    run = launch.load(KINDS, 'cuda').bind((1, 1, 1), (32, 1, 1), **NUMBERS)
    out = torch.zeros(6, device='cuda', dtype=torch.float64)
    address, best = out.data_ptr(), float('inf')
    for _ in range(20):
        torch.cuda.synchronize()  # few enough launches that the queue never fills
        start = time.perf_counter()
        for _ in range(200):
            run(out=address)
        best = min(best, (time.perf_counter() - start) / 200)
    start = time.perf_counter()
    for _ in range(1000):
        launch.load(KINDS, out.get_device())
    look_up = (time.perf_counter() - start) / 1000
    with capsys.disabled():
        print(f'\nlaunch {best * 1e6:.2f} us, look-up {look_up * 1e6:.2f} us')
    assert max(best, look_up) < 1e-3  # some 5 us on an idle host
