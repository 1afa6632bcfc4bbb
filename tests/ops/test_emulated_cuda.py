"""The CUDA kernels without a GPU (see emulated_cuda.py): what test_ss2d_cuda.py and
test_scan_cuda.py ask of them, at small sizes, for every generation of GPUs."""

import shutil

import emulated_cuda
import pytest
import test_scan_cuda as scans
import torch
from emulated_cuda import NEEDS_COMPILER, emulated_gpu
from test_scan_cuda import divided  # noqa: F401 (a fixture)
from test_ss2d_cuda import (
    check,
    check_norm,
    exact,
    make,
    norm_error,
    scheduled_around,
    scheduled_by_hand,
    without_clusters,
)

from vmamba_mm.ops import ss2d_scan
from vmamba_mm.ops.core import compile, launch
from vmamba_mm.ops.ss2d_scan import schedule
from vmamba_mm.testing import with_grads

pytestmark = NEEDS_COMPILER

HALVES = [torch.float16, torch.bfloat16]
GPUS = pytest.mark.parametrize('gpu', [(7, 5), (8, 0), (9, 0)], indirect=True,
                               ids='sm_{0[0]}{0[1]}'.format)


@pytest.fixture(autouse=True)
def gpu(request, compiled):
    capability = getattr(request, 'param', (9, 0))
    with emulated_gpu(compiled, capability):
        yield capability


def on_cpu(*args, **kwargs):
    return make(*args, device='cpu', **kwargs)


# --- N = 1, half precision ---------------------------------------------------------------------

@pytest.mark.parametrize('shape', [
    (1, 32, 1, 1), (3, 20, 1, 40), (1, 33, 37, 1), (3, 96, 7, 7), (3, 5, 9, 30), (20, 32, 7, 7),
    (1, 264, 7, 9)],
    ids='B{0[0]}-D{0[1]}-{0[2]}x{0[3]}'.format)
def test_shapes(shape):
    check(on_cpu(*shape))


@pytest.mark.parametrize('routes, rank', [(1, 9), (2, 1), (2, 48), (4, 5), (4, 8)])
def test_routes_and_ranks(routes, rank):
    check(on_cpu(2, 48, 9, 20, routes=routes, rank=rank))


@GPUS
@pytest.mark.parametrize('dtype', HALVES, ids=['fp16', 'bf16'])
def test_gpus_and_dtypes(monkeypatch, gpu, dtype):
    """One span, whole images to a span, and part of an image, where what enters must be found."""
    without_clusters(monkeypatch)
    if (dtype, gpu) == (torch.bfloat16, (7, 5)):
        with pytest.raises(ValueError, match='too old for torch.bfloat16'):
            check(on_cpu(2, 48, 9, 20, dtype=dtype))
        return
    for shape, independent in (((1, 48, 9, 14), True), ((12, 48, 7, 7), True),
                               ((1, 33, 30, 31), False)):
        inputs = on_cpu(*shape, dtype=dtype)
        plan = schedule.plan_of(*shape, 2, 4, inputs['x'].get_device())
        assert plan.forward.independent == plan.backward.independent == independent
        check(inputs)


@pytest.mark.parametrize('slots', ['exact', 'rounded'])
@pytest.mark.parametrize('spans', [1, 3])
@pytest.mark.parametrize('maps', [2, 4])
@pytest.mark.parametrize('size', [(5, 7, 7), (3, 9, 14), (9, 2, 3), (2, 1, 1)])
def test_any_cut(monkeypatch, size, maps, slots, spans):
    scheduled_by_hand(monkeypatch, maps, slots, spans)
    check(on_cpu(size[0], 48, *size[1:]))


@pytest.mark.parametrize('dtype', HALVES, ids=['fp16', 'bf16'])
@pytest.mark.parametrize('width, sets, cluster, spans', [
    (2, 1, 2, 3), (3, 4, 1, 1), (2, 2, 4, 2), (3, 1, 7, 1), (2, 1, 8, 1)])
@pytest.mark.parametrize('size', [(3, 30, 31), (5, 7, 7), (2, 1, 1)])
def test_chunks_that_go_around(monkeypatch, size, width, sets, cluster, spans, dtype):
    """Sets and blocks for which there is a chunk, many or none; several images in a span."""
    scheduled_around(monkeypatch, width, sets, cluster, spans, 'exact' if spans == 1 else 'rounded')
    check(on_cpu(size[0], 40, *size[1:], dtype=dtype))


def test_large_images_go_around():
    """What a GPU that has clusters chooses for few and large images."""
    assert schedule.plan_of(2, 96, 64, 64, 6, 4, 0).forward.cluster > 0
    assert schedule.plan_of(256, 96, 14, 14, 6, 4, 0).forward.cluster == 0


def test_strides_of_x():
    inputs = on_cpu(2, 32, 9, 14)
    x = inputs['x']
    turned = x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    for other in (x.contiguous(), turned):
        check(dict(inputs, x=other))


@pytest.mark.parametrize('bias', [-40., 0., 20., 1e3])
def test_extreme_delta(bias):
    inputs = on_cpu(2, 32, 9, 14)
    inputs['dt_projs_bias'].fill_(bias)
    if bias == 1e3:  # gradients are beyond fp16, and by A mere rounding
        assert norm_error(ss2d_scan(**inputs), exact(inputs)) <= 2**-10
    else:
        check(inputs)


@pytest.mark.parametrize('maps', [2, 4, 'around'])
def test_nan_stays_in_its_sample(monkeypatch, maps):
    """Four spans; with four maps, images 5, 11 and 17 are in two of them each. Or chunks that go
    around, where a state is handed on whatever it is."""
    if maps == 'around':
        scheduled_around(monkeypatch, 2, 2, 2, 1)
    else:
        scheduled_by_hand(monkeypatch, maps, 'exact', 4)
    inputs = on_cpu(20, 32, 7, 7)
    clean = with_grads(ss2d_scan, inputs)
    inputs['x'][11, 0, 2, 2] = torch.nan
    found = with_grads(ss2d_scan, inputs)
    for a, b in ((found[0], clean[0]), (found[1]['x'], clean[1]['x'])):
        assert torch.equal(a[:11], b[:11]) and torch.equal(a[12:], b[12:]) and a[11].isnan().any()


@pytest.mark.parametrize('shape, kwargs', [
    ((2, 48, 9, 20), {}), ((1, 33, 30, 31), {}), ((20, 32, 7, 7), {}),
    ((2, 40, 9, 20), dict(state=16)),
    ((1, 40, 30, 31), dict(state=4, dtype=torch.float32))], ids=str)
def test_bit_equal_whichever_thread_is_first(monkeypatch, shape, kwargs):
    inputs = on_cpu(*shape, **kwargs)
    y, grads = with_grads(ss2d_scan, inputs)
    for seed in (1, 2, 3):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again, grads_again = with_grads(ss2d_scan, inputs)
        assert torch.equal(again, y)
        assert all(torch.equal(grads_again[name], grads[name]) for name in grads)


@pytest.mark.parametrize('dim, dtype', [
    *((dim, torch.float16) for dim in (18, 32, 100, 768, 1536)), (48, torch.bfloat16),
    (18, torch.float32), (100, torch.float32)], ids=str)
def test_norm(dim, dtype):
    check_norm(on_cpu(2, dim, 5, 7, dtype=dtype))


# --- any N, fp32 ---------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [
    (1, 32, 1, 1, 1, 4, 2), (3, 20, 1, 40, 4, 4, 1), (1, 33, 37, 1, 16, 2, 3),
    (3, 100, 7, 7, 16, 4, 6), (1, 40, 9, 14, 40, 1, 2), (1, 200, 9, 10, 5, 4, 13)],
    ids='{0[0]}x{0[1]}x{0[2]}x{0[3]}-N{0[4]}-K{0[5]}'.format)
def test_scans(shape):
    scans.check(*scans.make(*shape, device='cpu'))


@pytest.mark.parametrize('dtype', HALVES, ids=['fp16', 'bf16'])
def test_scans_of_halves(dtype):
    scans.check(*scans.make(2, 50, 9, 15, 4, 4, 5, dtype=dtype, device='cpu'))


@pytest.mark.parametrize('state', [1, 4, 16])
@pytest.mark.usefixtures('divided')
def test_scans_in_spans(state):
    scans.check(*scans.make(2, 40, 17, 23, state, 4, 3, device='cpu'))


@GPUS
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_gpus_and_any_state(gpu, dtype):
    scans.check(*scans.make(2, 40, 9, 14, 16, 4, 3, dtype=dtype, device='cpu'))


def test_logs_of_scans():
    scans.check_logs('cpu')


@pytest.mark.parametrize('case', scans.FINISHES, ids=str)
def test_finish_of_scans(case):
    scans.check_finish(*case, 'cpu')


@pytest.mark.parametrize('case', scans.MERGES, ids=str)
def test_merge_of_fp32(case):
    for sizes in ((3, 100, 15), (1, 4, 1), (2, 132, 5)):
        scans.check_merge(*case, *sizes, 'cpu')


# --- the emulation itself ----------------------------------------------------------------------

MISTAKES = r'''
#include "common/common.cuh"
struct Params { float *out; };
__global__ void divergent(const Params p) {
    if (threadIdx.x == 0) __syncthreads();
    else __syncwarp();
}
__global__ void beyond(const Params p) {
    extern __shared__ __align__(16) float shared[];
    shared[threadIdx.x] = 1.f;
}
__global__ void unwritten(const Params p) {
    extern __shared__ __align__(16) float shared[];
    p.out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void waits(const Params p) {
    extern __shared__ __align__(16) float shared[];
    copy4(shared + threadIdx.x, p.out + threadIdx.x);
    commit_copies();
    if (WAITS) wait_copies<0>();
    p.out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void race(const Params p) { p.out[0] = threadIdx.x; }
template <class T> __global__ void convert(const Params p) {
    u32 *const bits = (u32 *)p.out + blockIdx.x * blockDim.x + threadIdx.x;
    *bits = T::pack(T::unpack(*bits).x, 0.f);
}
template <class T> __global__ void round(const Params p) {
    float *const v = p.out + blockIdx.x * blockDim.x + threadIdx.x;
    *v = T::unpack(T::pack(*v, 0.f)).x;
}
'''


@pytest.fixture
def run_mistake(tmp_path):
    (tmp_path / 'mistakes.cu').write_text(MISTAKES)
    shutil.copytree(compile.KERNELS / 'common', tmp_path / 'common')

    def run(name, out, blocks=1, shared=0, waits=0):
        instance = launch.Instance('mistakes.cu', name, defines=(('WAITS', waits),))
        launch.load(instance, 0).bind((blocks, 1, 1), (min(32, len(out)), 1, 1), shared)(
            out=out.data_ptr())
        return out

    with compile.override_cache(kernels=tmp_path):
        yield run


def test_mistakes_are_found(run_mistake, monkeypatch):
    out = torch.ones(32)
    with pytest.raises(RuntimeError, match='divergent.*wait for one another'):
        run_mistake('divergent', out)
    with pytest.raises(RuntimeError, match='beyond.*its shared memory'):
        run_mistake('beyond', out, shared=124)
    run_mistake('beyond', out, shared=128)
    assert run_mistake('waits', out, shared=128, waits=1).eq(1).all()
    assert run_mistake('waits', out, shared=128, waits=0).isnan().all()
    assert run_mistake('unwritten', out, shared=128).isnan().all()
    winners = set()
    for seed in range(4):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        winners.add(run_mistake('race', out)[0].item())
    assert len(winners) > 1


@pytest.mark.parametrize('type_, dtype', [('Half', torch.float16), ('BFloat', torch.bfloat16)])
def test_conversions(run_mistake, type_, dtype):
    every = torch.arange(2**16, dtype=torch.int32)
    there_and_back = run_mistake(f'convert<{type_}>', every.clone(), blocks=2**11)
    is_nan = every.to(torch.int16).view(dtype).isnan()
    assert torch.equal(there_and_back[~is_nan], every[~is_nan])
    assert there_and_back[is_nan].to(torch.int16).view(dtype).isnan().all()
    # Fractions of values, those between neighbours, and what is too large or too small.
    values = every.to(torch.int16).view(dtype)[~is_nan].float()
    values = torch.cat([values * scale for scale in (1, 1 + 2**-12, 1 + 2**-9, 1 - 2**-9)])
    values = values[:len(values) // 32 * 32]
    rounded = run_mistake(f'round<{type_}>', values.clone(), blocks=len(values) // 32)
    assert torch.equal(rounded, values.to(dtype).float())
