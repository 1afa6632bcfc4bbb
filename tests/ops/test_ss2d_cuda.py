"""The CUDA kernels of ss2d_scan against the fp64 reference, as accurate as autocast PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from vmamba_mm.ops import cross_merge, cross_scan, selective_scan, ss2d_scan, ss2d_scan_norm
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.core.instances import INSTANCES
from vmamba_mm.ops.scan_kernels.cuda import magic
from vmamba_mm.ops.ss2d_scan import chunked, cuda, schedule
from vmamba_mm.testing import relative_error, ss2d_scan_inputs, with_grads

needs_gpu = pytest.mark.gpu(nvidia=True)

SHAPES = [(1, 32, 1, 1), (3, 20, 1, 40), (1, 33, 37, 1), (3, 96, 7, 7), (1, 384, 14, 14),
          (3, 5, 9, 30), (1, 96, 37, 53), (3, 192, 56, 56), (1, 96, 200, 336), (40, 768, 7, 7)]


def naive(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D, out_dtype=torch.float32):
    """Plain PyTorch under autocast: projections in half precision, the scan in fp32."""
    rank, state = dt_projs_weight.shape[2], A.shape[1]
    x_BKDL = cross_scan(x, len(x_proj_weight))
    projected = torch.einsum('bkdl,kcd->bkcl', x_BKDL, x_proj_weight.to(x.dtype))
    dt, B, C = projected.split((rank, state, state), dim=2)
    delta = torch.einsum('bkrl,kdr->bkdl', dt, dt_projs_weight.to(x.dtype))
    y = selective_scan(x_BKDL.flatten(1, 2).float(), delta.flatten(1, 2).float(), A, B.float(),
                       C.float(), D, delta_bias=dt_projs_bias.flatten(), delta_softplus=True,
                       backend='chunked')
    return cross_merge(y.view_as(x_BKDL), *x.shape[2:])


def norm_error(actual, expected):
    """Relative, in the 2-norm: a maximum over few elements would be luck."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-20)).item()


def make(batch, dim, height, width, dtype=torch.float16, device='cuda', **kwargs):
    inputs = ss2d_scan_inputs(batch, dim, height, width, device=device, **kwargs)
    inputs['x'] = inputs['x'].to(dtype).contiguous(memory_format=torch.channels_last)
    return inputs


def exact(inputs):
    """In fp64 by plain PyTorch, which other tests hold to the reference."""
    return chunked.forward(*(t.double() for t in inputs.values()), torch.float64)


def check(inputs):
    """The result and every gradient: at most twice the error of autocast PyTorch."""
    dtype, device = inputs['x'].dtype, inputs['x'].device
    rng = torch.Generator(device).manual_seed(1)
    grad_y = torch.randn(inputs['x'].shape, generator=rng, device=device).to(dtype)
    expected = exact(inputs)
    expected_grads = chunked.backward(grad_y.double(), *(t.double() for t in inputs.values()))
    plain, plain_grads = with_grads(naive, inputs, grad_y)
    y, grads = with_grads(ss2d_scan, inputs, grad_y, out_dtype=torch.float32, backend='cuda')
    assert y.dtype == torch.float32 and y.stride() == inputs['x'].stride()
    floor = 2**-11 if dtype == torch.float16 else 2**-8  # of rounding once
    assert norm_error(y, expected) <= 2 * max(norm_error(plain, expected), floor)
    for (name, grad), true in zip(grads.items(), expected_grads, strict=True):
        assert grad.dtype == inputs[name].dtype and grad.stride() == inputs[name].stride()
        limit = 2 * max(norm_error(plain_grads[name], true), floor)
        assert norm_error(grad, true) <= limit, name
    half = ss2d_scan(**inputs)
    assert half.dtype == dtype and torch.equal(half, y.to(dtype))
    return y


def check_norm(inputs):
    """The same of the op that ends with the norm."""
    x = inputs['x']
    floor = 1e-5 if x.dtype == torch.float32 else 2**-12
    dim, rng = x.shape[1], torch.Generator(x.device).manual_seed(2)
    weight, bias = torch.randn(2, dim, generator=rng, device=x.device)

    def normed(y):
        return F.layer_norm(y.permute(0, 2, 3, 1), (dim,), weight.to(y.dtype), bias.to(y.dtype)
                            ).permute(0, 3, 1, 2)

    expected = normed(exact(inputs))
    with torch.no_grad():
        y = ss2d_scan_norm(**inputs, norm_weight=weight, norm_bias=bias)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    limit = 2 * max(norm_error(normed(naive(**inputs)), expected), floor)
    assert norm_error(y, expected) <= limit
    everything = dict(inputs, norm_weight=weight, norm_bias=bias)
    _, true = with_grads(ss2d_scan_norm, {k: t.double() for k, t in everything.items()})
    _, plain = with_grads(lambda norm_weight, norm_bias, **rest: F.layer_norm(
        naive(**rest).permute(0, 2, 3, 1), (dim,), norm_weight, norm_bias
    ).permute(0, 3, 1, 2).to(x.dtype), everything)
    trained, grads = with_grads(ss2d_scan_norm, everything, backend='cuda')
    assert torch.equal(trained, y)
    for name, grad in grads.items():
        assert grad.dtype == everything[name].dtype
        limit = 2 * max(norm_error(plain[name], true[name]), floor)
        assert norm_error(grad, true[name]) <= limit, name


def without_clusters(monkeypatch):
    """Plans in which a warp has all chunks of its span."""
    monkeypatch.setattr(schedule, 'cluster_schedules', lambda *args: ())
    launch.forget()


def scheduled_around(monkeypatch, width, sets, cluster, spans, slots='exact'):
    """Plans in which the chunks go around so many sets of ``width`` warps, and blocks."""
    plan_of = schedule.plan_of

    def plan(batch, dim, height, width_of_map, *args):
        plan = plan_of(batch, dim, height, width_of_map, *args)
        count, chunks, alone = slots_of(slots, batch, height * width_of_map)
        span = -(-chunks // (alone * spans)) * alone
        work = plan.forward._replace(
            maps=plan.routes, warps=width * sets, columns=-(-plan.groups // width), span=span,
            spans=-(-chunks // span), image_chunks=alone, independent=True, sets=sets,
            cluster=cluster, shared=100_000)  # or less
        back = plan.backward._replace(maps=plan.routes, span=chunks, spans=1, independent=True)
        return plan._replace(slots=count, chunks=chunks, forward=work, backward=back,
                             magic=(*plan.magic[:2], magic(count)))

    monkeypatch.setattr(schedule, 'plan_of', plan)
    launch.forget()


def slots_of(slots, batch, length):
    """Of an image, 'exact' or 'rounded'; chunks of the batch, and until an image begins with one
    again."""
    count = -(-length // 7)
    if slots == 'rounded':
        count = -(-count // 8) * 8
    return count, -(-batch * count // 8), count // math.gcd(count, 8)


def scheduled_by_hand(monkeypatch, maps, slots, spans):
    """Plans of so many maps and spans, the slots of an image 'exact' or 'rounded'."""
    without_clusters(monkeypatch)
    plan_of = schedule.plan_of

    def plan(batch, dim, height, width, *args):
        plan = plan_of(batch, dim, height, width, *args)
        count, chunks, alone = slots_of(slots, batch, height * width)
        unit = alone if maps == 2 else 1
        span = -(-chunks // (unit * spans)) * unit
        cuts = [work._replace(maps=maps, span=span, spans=-(-chunks // span), image_chunks=alone,
                              independent=maps == 2 or span >= chunks,
                              shared=work.shared + work.warps * 8192 + 16384)  # or more
                for work in (plan.forward, plan.backward)]
        return plan._replace(slots=count, chunks=chunks, forward=cuts[0], backward=cuts[1],
                             magic=(*plan.magic[:2], magic(count)))

    monkeypatch.setattr(schedule, 'plan_of', plan)
    launch.forget()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What the kernels leave unwritten is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(2**31 - 1)

    monkeypatch.setattr(torch, 'empty', poisoned)
    yield
    launch.forget()  # a plan made by hand


@needs_gpu
@pytest.mark.parametrize('shape', SHAPES, ids='B{0[0]}-D{0[1]}-{0[2]}x{0[3]}'.format)
def test_shapes(shape):
    check(make(*shape))


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('routes', [1, 2, 4])
@pytest.mark.parametrize('rank', [1, 5, 8, 9, 48])
def test_routes_ranks_and_dtypes(dtype, routes, rank):
    for size in ((2, 48, 9, 20), (1, 32, 70, 41)):  # one span, and several
        check(make(*size, dtype=dtype, routes=routes, rank=rank))


@needs_gpu
@pytest.mark.parametrize('state', [4, 16])
def test_more_states_by_the_kernels_for_any_state(state):
    check(make(2, 48, 9, 20, state=state))
    inputs = make(2, 48, 9, 20, state=state)
    single = dict(inputs, x=inputs['x'].float())
    y, grads = with_grads(ss2d_scan, single, backend='cuda')
    doubles = {name: t.double() for name, t in single.items()}
    assert relative_error(y, exact(doubles)) <= 1e-5
    for name, true in with_grads(ss2d_scan, doubles)[1].items():
        assert relative_error(grads[name], true) <= 1e-5, name


@needs_gpu
def test_many_images_to_a_block():
    inputs = make(300, 384, 7, 7)
    plan = schedule.plan_of(*inputs['x'].shape, inputs['dt_projs_weight'].shape[2], 4, 0)
    assert 8 * plan.forward.span > plan.slots and 8 * plan.backward.span > plan.slots
    check(inputs)


@needs_gpu
@pytest.mark.parametrize('slots', ['exact', 'rounded'])
@pytest.mark.parametrize('spans', [1, 3])
@pytest.mark.parametrize('maps', [2, 4])
@pytest.mark.parametrize('size', [(5, 7, 7), (3, 9, 14), (9, 2, 3), (2, 1, 1), (3, 25, 40)])
def test_any_cut(monkeypatch, size, maps, slots, spans):
    """However the batch is cut into slots and spans; of whole images if routes share a map."""
    batch, height, width = size
    scheduled_by_hand(monkeypatch, maps, slots, spans)
    check(make(batch, 48, height, width))


@needs_gpu
@pytest.mark.parametrize('width, sets, cluster', [
    (2, 1, 2), (3, 4, 1), (2, 2, 4), (3, 2, 7), (2, 3, 8), (12, 1, 2)])
@pytest.mark.parametrize('size', [(1, 37, 53), (5, 7, 7), (3, 2, 3), (2, 40, 25)])
def test_chunks_that_go_around(monkeypatch, size, width, sets, cluster):
    """Sets and blocks for which there is a chunk, many or none; several images in a span."""
    batch, height, width_of_map = size
    for slots, spans in (('exact', 1), ('rounded', batch)):
        with monkeypatch.context() as patch:
            scheduled_around(patch, width, sets, cluster, spans, slots)
            check(make(batch, 72, height, width_of_map))
    launch.forget()


@needs_gpu
def test_strides_of_x():
    inputs = make(2, 32, 9, 14)
    expected, expected_grads = with_grads(ss2d_scan, inputs)
    wide = torch.randn(2, 64, 9, 14, device='cuda').half().contiguous(
        memory_format=torch.channels_last)
    wide[:, 32:] = inputs['x']
    turned = inputs['x'].transpose(2, 3).contiguous(
        memory_format=torch.channels_last).transpose(2, 3)
    leaves = list(inputs.values())[1:]
    grad_y = torch.randn(expected.shape, dtype=torch.float64, device='cuda',
                         generator=torch.Generator('cuda').manual_seed(1)).half()
    for x in (inputs['x'].contiguous(), wide[:, 32:], turned):
        x.requires_grad_()
        y = ss2d_scan(x, *leaves)
        assert relative_error(y, expected) < 1e-3
        for g in (grad_y, grad_y.contiguous(), grad_y.float()):
            grad, = torch.autograd.grad(y, x, g, retain_graph=True)
            assert relative_error(grad, expected_grads['x']) < 1e-3
    one = ss2d_scan(inputs['x'][:1].expand(2, -1, -1, -1), *leaves)
    assert torch.equal(one[0], expected[0]) and torch.equal(one[1], expected[0])
    odd = wide[:, 31:63]  # no aligned vectors
    assert torch.equal(ss2d_scan(**dict(inputs, x=odd)),
                       ss2d_scan(**dict(inputs, x=odd.clone())))


@needs_gpu
@pytest.mark.parametrize('bias', [-40., 0., 20., 1e3])
def test_extreme_delta(bias):
    inputs = make(2, 32, 9, 14)
    inputs['dt_projs_bias'].fill_(bias)
    check(inputs)
    inputs['x'].zero_()
    assert not ss2d_scan(**inputs).any()


@needs_gpu
def test_nan_stays_in_its_sample():
    inputs = make(300, 32, 7, 7)
    clean = with_grads(ss2d_scan, inputs)
    inputs['x'][1, 0, 2, 2] = torch.nan
    found = with_grads(ss2d_scan, inputs)
    for a, b in ((found[0], clean[0]), (found[1]['x'], clean[1]['x'])):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2:], b[2:]) and a[1].isnan().any()


@needs_gpu
def test_bit_equal_from_run_to_run():
    inputs = make(1, 96, 120, 90)
    first, grads = with_grads(ss2d_scan, inputs)
    for _ in range(4):
        again, grads_again = with_grads(ss2d_scan, inputs)
        assert torch.equal(again, first)
        assert all(torch.equal(grads_again[name], grads[name]) for name in grads)


@needs_gpu
@pytest.mark.parametrize('dim', [32, 96, 100, 768, 1536, 18])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=['fp16', 'fp32'])
def test_norm(dim, dtype):
    check_norm(make(2, dim, 9, 14, dtype=dtype))


@needs_gpu
def test_graph_stream_and_compile(monkeypatch):
    monkeypatch.undo()  # dynamo does not know the patched torch.empty
    inputs = make(2, 96, 14, 14)
    expected = ss2d_scan(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ss2d_scan(**inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = ss2d_scan(**inputs)
    stream.synchronize()
    assert torch.equal(other, expected)
    compiled = torch.compile(lambda *args: ss2d_scan(*args) * 2, fullgraph=True)
    assert torch.equal(compiled(*inputs.values()), expected * 2)


@needs_gpu
@pytest.mark.parametrize('save', [False, True])
@pytest.mark.parametrize('state', [1, 4])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=['fp16', 'fp32'])
def test_shapes_of_what_is_kept(monkeypatch, dtype, state, save):
    monkeypatch.undo()
    checks = ('test_schema', 'test_faketensor')
    ops = torch.ops.vmamba_mm
    tensors = list(make(2, 36, 9, 14, dtype=dtype, state=state).values())
    norm = [torch.ones(36, device='cuda'), torch.zeros(36, device='cuda')]
    args = (*tensors, torch.float32, 'cuda', save)
    opcheck(ops.ss2d_scan_fwd.default, args, test_utils=checks)
    args_norm = (*tensors, *norm, 1e-5, save)
    opcheck(ops.ss2d_scan_norm.default, args_norm, test_utils=checks)
    if save:
        y, *saved = ops.ss2d_scan_fwd(*args)
        opcheck(ops.ss2d_scan_bwd.default, (y, *tensors, *saved, 'cuda'), test_utils=checks)
        y, *saved = ops.ss2d_scan_norm(*args_norm)
        opcheck(ops.ss2d_scan_norm_bwd.default, (y, *tensors, *norm, *saved), test_utils=checks)


@needs_gpu
def test_is_chosen_without_being_told():
    inputs = make(1, 32, 8, 8)
    assert torch.equal(ss2d_scan(**inputs), ss2d_scan(**inputs, backend='cuda'))
    with pytest.raises(ValueError, match='the kernels take float16'):
        ss2d_scan(**dict(inputs, x=inputs['x'].double()), backend='cuda')


def test_reasons_against():
    inputs = ss2d_scan_inputs(1, 32, 4, 4)
    x, *parameters = inputs.values()
    assert 'is on cpu' in cuda.why_not(x, torch.float32, tuple(parameters))


def test_every_kernel_of_the_published_models_is_checked_in_ci():
    from vmamba_mm.families.vmamba import ARCHS

    for arch in ARCHS.values():
        for stage in range(4):
            tiles = -(-arch['embed_dims'] * 2**stage // 128)
            for type_ in ('Half', 'BFloat'):
                assert arch['d_state'] > 1 or {
                    cuda.forward_instance(type_, tiles),
                    cuda.backward_instance(type_, tiles, False)} <= INSTANCES.keys()
