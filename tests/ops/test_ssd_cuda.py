"""The kernels in kernels/ssd, against fp64, in more cuts than in test_ops.py.

A device is 'cuda', or 'sm_90': such a GPU emulated on the CPU.
"""

import emulated_cuda
import pytest
import torch

from vmamba_mm.layers import Mamba2Mixer
from vmamba_mm.ops import ssd
from vmamba_mm.ops.core import backends, launch
from vmamba_mm.ops.ssd import cuda, cuda_backward, cuda_launch
from vmamba_mm.ops.ssd.cuda_launch import Shape, Sizes
from vmamba_mm.testing import assert_close, ssd_inputs

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LIMITS = {SINGLE: 1e-5, HALF: 2e-3, BRAIN: 1.6e-2}


@pytest.fixture
def cut(monkeypatch):
    """Sets how work is divided."""
    def change(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        launch.forget()

    yield change
    monkeypatch.undo()
    launch.forget()


def make(place, *shape, dtype=SINGLE, packed=False):
    """All inputs of an op, in one tensor for x, B and C, as a layer has them; and gradients."""
    batch, length, heads, dim, groups, state = shape
    inputs = {name: t.to(place) for name, t in ssd_inputs(*shape, dtype=dtype).items()}
    parts = [inputs[name].flatten(2) for name in 'xBC']
    x, B, C = torch.cat(parts, dim=2).split([t.shape[2] for t in parts], dim=2)
    inputs.update(x=x.unflatten(2, (heads, dim)), B=B.unflatten(2, (groups, state)),
                  C=C.unflatten(2, (groups, state)))
    rng = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=rng)

    inputs |= dict(z=randn(batch, length, heads, dim).to(place, dtype),
                   initial_state=randn(batch, heads, dim, state).to(place))
    if packed:
        starts = torch.rand(batch, length, generator=rng) < 0.15
        inputs['seq_idx'] = (starts.cumsum(1) % 3).to(place)
    grads = randn(batch, length, heads, dim).to(place, dtype), randn(
        batch, heads, dim, state).to(place)
    return inputs, grads


def run(inputs, grads, backend, **options):
    """{what: value} for both results and every gradient."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    options = dict(dt_softplus=True) | options
    results = ssd(**leaves, **options, return_final_state=True, backend=backend)
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    found = torch.autograd.grad(results, [leaves[name] for name in wanted],
                                [g.to(t.dtype) for g, t in zip(grads, results, strict=True)])
    return dict(y=results[0].detach(), final_state=results[1].detach(),
                **dict(zip(wanted, found, strict=True)))


def check(inputs, grads, limit=None, **options):
    found = run(inputs, grads, 'cuda', **options)
    double = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = run(double, [g.double() for g in grads], 'chunked', **options)
    for name, right in exact.items():
        error = (found[name].double() - right).norm() / right.norm().clamp_min(1e-20)
        assert error <= (limit or LIMITS[inputs['x'].dtype]), (name, error.item())
    return found


SMALL = 2, 135, 4, 32, 2, 16


@pytest.mark.parametrize('dtype', [SINGLE, HALF, BRAIN], ids=str)
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('packed', [False, True])
def test_everything_at_once(place, dtype, reverse, packed):
    check(*make(place, *SMALL, dtype=dtype, packed=packed), reverse=reverse, dt_limit=(0.1, 1.5))


@pytest.mark.parametrize('length', [1, 16, 63, 64, 65, 128, 193])
def test_lengths(place, length):
    check(*make(place, 1, length, 2, 16, 1, 16))


@pytest.mark.parametrize('shape', [
    Shape(1, 1, 1, 2), Shape(1, 2, 1, 2), Shape(1, 2, 2, 2), Shape(1, 1, 2, 1), Shape(1, 1, 3, 2),
    Shape(2, 1, 1, 2), Shape(2, 2, 1, 1), Shape(2, 2, 2, 2), Shape(2, 1, 3, 2), Shape(1, 4, 1, 1),
    Shape(1, 4, 3, 2), Shape(1, 4, 4, 1), Shape(2, 4, 2, 1)], ids=str)
def test_shapes_of_blocks(place, cut, shape):
    cut(cuda_launch, force=shape)
    heads, dim = 6 if shape.heads == 3 else 2 * shape.heads, max(32, shape.width)
    check(*make(place, 1, 135, heads, dim, 2, 16 * shape.parts, dtype=HALF), reverse=True)


@pytest.mark.parametrize('sizes, shape', [
    (Sizes(64, 3136, 3, 64, 1, 64), Shape(2, 4, 1, 2)),
    (Sizes(64, 196, 12, 64, 1, 64), Shape(1, 4, 3, 2)),
    (Sizes(64, 49, 24, 64, 1, 64), Shape(1, 4, 4, 2)),
    (Sizes(128, 3136, 6, 32, 1, 16), Shape(1, 2, 2, 2)),
    (Sizes(1, 65536, 6, 64, 1, 64), Shape(1, 4, 1, 1)),
    (Sizes(8, 2048, 80, 64, 1, 128), Shape(1, 4, 3, 2)),
    (Sizes(1, 196, 12, 64, 1, 64), Shape(2, 4, 1, 2))], ids=str)
def test_what_was_fastest_on_an_h200(monkeypatch, sizes, shape):
    monkeypatch.setattr(cuda_launch, 'device_limits', lambda index: (132, 233472, 232448))
    assert cuda_launch.forward_shape(0, 2, sizes) == shape


@pytest.mark.parametrize('span', [1, 2])
@pytest.mark.parametrize('reverse', [False, True])
def test_spans(place, cut, span, reverse):
    cut(cuda_launch, max_span=span)
    check(*make(place, 2, 321, 2, 16, 1, 16, packed=reverse), reverse=reverse)


@pytest.mark.parametrize('reverse', [False, True])
def test_sequences_in_two_parts(place, cut, reverse):
    """Six blocks on four multiprocessors: two sequences are divided, and the three heads of the
    second block of a group of five are partly those of the first."""
    inputs, _ = make(place, 3, 500, 5, 16, 1, 16, dtype=HALF, packed=reverse)
    options = dict(dt_softplus=True, reverse=reverse, return_final_state=True, backend='cuda')
    cut(cuda_launch, force=Shape(1, 1, 1, 1))
    alone = ssd(**inputs, **options)
    cut(cuda_launch, force=Shape(1, 1, 3, 2), device_limits=lambda index: (4, 0, 232448))
    divided = ssd(**inputs, **options)
    assert all(torch.equal(one, other) for one, other in zip(divided, alone, strict=True))


@pytest.mark.parametrize('blocks, slots, chunks, expected', [
    (216, 132, 32, (84, 22)), (320, 132, 32, (56, 16)), (264, 132, 32, (0, 0)),
    (130, 132, 32, (0, 0)), (250, 132, 32, (0, 0)), (216, 132, 7, (0, 0))])
def test_cuts(blocks, slots, chunks, expected):
    assert cuda_launch.cut_of(blocks, slots, chunks) == expected


def test_heads_of_a_group_divided_and_samples_in_pieces(place, cut):
    inputs = make(place, 3, 70, 6, 16, 2, 16)
    whole = check(*inputs)
    cut(cuda_backward, max_split=2, MOST_STATES=1)
    divided = check(*inputs)
    assert all(torch.equal(whole[name], divided[name]) for name in whole if name not in 'BC')


@pytest.mark.parametrize('dim, state, dtype', [
    (128, 128, BRAIN), (64, 256, HALF), (40, 24, SINGLE), (8, 8, HALF)], ids=str)
def test_sizes(place, dim, state, dtype):
    check(*make(place, 1, 70, 2, dim, 1, state, dtype=dtype))


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('shape, packed, cuts', [
    ((2, 135, 3, 64, 1, 128), False, {}), ((2, 64, 2, 64, 1, 128), True, {}),
    ((1, 200, 4, 40, 2, 72), True, dict(max_split=2))], ids=str)
def test_groups_of_warps(place, cut, shape, packed, cuts, reverse):
    """bf16 with 33 to 64 channels and 65 to 128 states: products of four warps, on sm_90."""
    cut(cuda_backward, **cuts)
    inputs, grads = make(place, *shape, dtype=BRAIN, packed=packed)
    if reverse:
        inputs['D'] = torch.randn(*inputs['x'].shape[2:], device=place)
    check(inputs, grads, reverse=reverse, dt_limit=(0.1, 1.5))


@pytest.mark.parametrize('reverse', [False, True])
def test_groups_of_warps_in_spans(place, cut, reverse):
    cut(cuda_launch, max_span=2)
    inputs, grads = make(place, 1, 330, 2, 64, 1, 128, dtype=BRAIN)
    if reverse:
        del inputs['D'], inputs['initial_state']
    check(inputs, grads, reverse=reverse)


def test_groups_of_warps_are_bit_equal_whichever_is_first(place, monkeypatch):
    inputs, grads = make(place, 1, 135, 3, 64, 1, 128, dtype=BRAIN)
    first = run(inputs, grads, 'cuda')
    for seed in (1, 2, 3):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again = run(inputs, grads, 'cuda')
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize('dtype, sizes, expected', [
    (BRAIN, (64, 128), True), (BRAIN, (40, 72), True), (HALF, (64, 128), False),
    (BRAIN, (64, 64), False), (BRAIN, (128, 128), False)])
def test_which_have_groups_of_warps(monkeypatch, dtype, sizes, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    assert cuda_launch.has_groups(0, dtype, Sizes(1, 64, 1, sizes[0], 1, sizes[1])) == expected


def test_fewer_channels_to_a_block_where_memory_is_short(place):
    """In fp32 the states of 64 channels, with N = 256, have no room beside B and C."""
    inputs, _ = make(place, 1, 70, 1, 64, 1, 256)
    found = ssd(**inputs, dt_softplus=True, backend='cuda')
    exact = ssd(**{name: t.double() for name, t in inputs.items()}, dt_softplus=True,
                backend='chunked')
    assert_close(found, exact.float(), LIMITS[SINGLE])


@pytest.mark.parametrize('strength', [(1, 300), (50, 1e4)])
def test_strong_decay(place, strength):
    inputs, grads = make(place, 1, 150, 2, 16, 1, 16)
    inputs['A'] = inputs['A'] * torch.tensor(strength, device=inputs['A'].device)
    del inputs['initial_state']  # what reaches it is below fp32's range
    # The logarithm of a decay within 16 tokens is a difference of sums, which are up to 16 * 50
    # here: half of the last bit of that is 3e-5.
    check(inputs, grads, limit=3e-5)


def test_large_steps_without_softplus(place):
    inputs, grads = make(place, 1, 70, 2, 16, 1, 16)
    inputs['dt'] = inputs['dt'] * 30  # negative ones count as 0
    check(inputs, grads, dt_softplus=False)


def test_products_beyond_fp16(place):
    """C B^T is kept in half precision for the backward, divided by a power of two."""
    inputs, grads = make(place, 1, 70, 2, 16, 1, 16, dtype=HALF)
    inputs.update(B=inputs['B'] * 300, C=inputs['C'] * 300, dt=inputs['dt'] - 8)
    assert (inputs['C'].float() @ inputs['B'].float().mT).abs().max() > 7e4
    check(inputs, grads, limit=4e-3)


def test_mixed_dtypes(place):
    """Maps of different dtypes are read as fp32; the result has that of x."""
    inputs, grads = make(place, 1, 70, 2, 16, 1, 16, dtype=BRAIN)
    inputs.update(B=inputs['B'].float(), D=inputs['D'].half(), A=inputs['A'].to(BRAIN))
    found = check(inputs, grads, limit=4e-3)
    assert found['y'].dtype == BRAIN and found['D'].dtype == HALF


def test_bit_equal_whichever_thread_is_first(place, monkeypatch):
    inputs, grads = make(place, *SMALL, dtype=HALF)
    first = run(inputs, grads, 'cuda')
    for seed in (1, 2, 3):
        monkeypatch.setattr(emulated_cuda.Kernel, 'seed', seed)
        again = run(inputs, grads, 'cuda')
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize('shape, message', [
    ((1, 5, 2, 12, 1, 16), 'P is 12; the kernels take multiples of 8'),
    ((1, 5, 2, 136, 1, 16), 'P is 136; the kernels take multiples of 8 up to 128'),
    ((1, 5, 2, 16, 1, 12), 'N is 12; the kernels take multiples of 8')])
def test_why_not(place, shape, message):
    inputs, _ = make(place, *shape)
    with pytest.raises(ValueError, match=message):
        ssd(**inputs, backend='cuda')


def test_memory_of_a_training_that_does_not_fit(place):
    inputs, _ = make(place, 1, 5, 1, 128, 1, 256)
    arguments = [inputs.get(name) for name in (
        'x', 'dt', 'A', 'B', 'C', 'D', 'dt_bias', 'z', 'initial_state')]
    for training, dtype, fits in ((False, HALF, True), (False, SINGLE, True), (True, HALF, False)):
        x, *rest = arguments
        x = x.to(dtype).requires_grad_(training)
        rest = [t.to(dtype) if i in (2, 3, 6) else t for i, t in enumerate(rest)]
        reason = cuda.why_not(x, *rest, None, True, 0.0, 1.0, False, False)
        assert (reason is None) == fits, (training, dtype, reason)
        assert fits or 'in training' in reason


@pytest.mark.parametrize('sequences, length, expected', [
    (12, 256, (4, 1)), (12, 257, (4, 2)), (132, 65536, (1024, 1)), (6, 65536, (16, 64)),
    (1, 1, (1, 1)), (131, 65536, (342, 3))])
def test_spans_of_an_h200(monkeypatch, sequences, length, expected):
    """Up to 256 tokens are one launch, and so is what fills the GPU."""
    monkeypatch.setattr(cuda_launch, 'device_limits', lambda index: (132, 228 * 1024, 227 * 1024))
    sizes = cuda_launch.Sizes(1, length, sequences, 64, 1, 64)
    assert cuda_launch.span_of(0, sizes, sequences) == expected


@pytest.mark.parametrize('blocks, sizes, counts, expected', [
    (2, (2048, 80, 64, 1, 128), [3, 3, 2], 8), (3, (196, 12, 64, 1, 64), [64], 3),
    (3, (3136, 3, 64, 1, 64), [64], 1), (3, (196, 12, 64, 1, 64), [1], 12)])
def test_turns_of_an_h200(monkeypatch, blocks, sizes, counts, expected):
    """The heads of a group are divided so that blocks fill the GPU, at last too."""
    for module in (cuda_launch, cuda_backward):
        monkeypatch.setattr(module, 'device_limits', lambda index: (132, 228 * 1024, 227 * 1024))
    assert cuda_backward.head_splits(0, blocks, Sizes(0, *sizes), counts) == expected


def test_mixer_is_that_of_plain_pytorch(place, monkeypatch):
    """x, B and C are parts of what the convolution gives, and dt of what the projection does."""
    torch.manual_seed(0)
    mixer = Mamba2Mixer(32, d_state=16, head_dim=16, n_groups=2, D_has_hdim=True, rmsnorm=False,
                        learnable_init_states=True).to(place)
    x = torch.randn(2, 70, 32, device=place)
    launched, launch_of = [], cuda._forward_launch

    def recorded(*args):
        launched.append(args)
        return launch_of(*args)

    def run_mixer():
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])

    monkeypatch.setattr(cuda, '_forward_launch', recorded)
    found = run_mixer()
    assert len(launched) == 2  # the backward calculates the result before the gate again
    monkeypatch.setattr(backends, 'KERNEL_DEVICES', ())
    for one, right in zip(found, run_mixer(), strict=True):
        assert_close(one, right, 2e-5)
    assert len(launched) == 2
