"""The fused functions and the module Mamba in all forms, from their equations."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from s6_by_hand import conv, gradients, mix, on, random, scan, tolerance
from torch import nn

from vmamba_mm.testing import DEVICES, assert_close

#: C of a model of 8 channels: D 16, N 3, R 1, W 4.
DIM, INNER, STATE, RANK, WIDTH, LENGTH = 8, 16, 3, 1, 4, 6


def inputs():
    """xz, conv weight and bias, x_proj, dt_proj, A, D, dt bias."""
    shapes = ((2, 2 * INNER, LENGTH), (INNER, 1, WIDTH), (INNER,), (RANK + 2 * STATE, INNER),
              (INNER, RANK), (INNER, STATE), (INNER,), (INNER,))
    tensors = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    tensors[3] = tensors[3] / 4
    tensors[5] = -tensors[5].exp()
    return tensors


def in_order(function, *args, **kwargs):
    """``function`` of the arguments of :func:`mix`, in mamba_ssm's order."""
    xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias = args
    return function(xz, conv_weight, conv_bias, x_proj, dt_proj, A, None, None, D,
                    delta_bias=dt_bias, **kwargs)


def with_out_proj(function, *args):
    """The same for those with ``out_proj``, whose weight and bias come last in ``args``."""
    *args, weight, bias = args
    return in_order(lambda *inner, **kwargs: function(*inner[:5], weight, bias, *inner[5:],
                                                      **kwargs), *args)


def assert_same(function, by_hand, tensors, device='cpu'):
    expected, grads = gradients(by_hand, tensors)
    y, found = gradients(function, on(device, tensors))
    for i, (a, b) in enumerate(zip([y, *found], [expected, *grads], strict=True)):
        assert_close(a.cpu(), b, tolerance(device), str(i))


@pytest.mark.parametrize('device', DEVICES)
def test_mamba_inner_fn_no_out_proj(device):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj
    assert_same(partial(in_order, mamba_inner_fn_no_out_proj), mix, inputs(), device=device)


@pytest.mark.parametrize('name', ['mamba_inner_fn', 'mamba_inner_ref'])
@pytest.mark.parametrize('absent', [(), (2,), (6, 7), (9,)], ids=str)
def test_mamba_inner_fn(name, absent):
    """Without a bias of the convolution, without D and the bias of dt, without one of out_proj."""
    import mamba_ssm.ops.selective_scan_interface as interface
    tensors = [*inputs(), random(DIM, INNER, seed=8), random(DIM, seed=9)]
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]

    def by_hand(*args):
        return F.linear(mix(*args[:8]).transpose(1, 2), *args[8:])

    assert_same(partial(with_out_proj, getattr(interface, name)), by_hand, tensors)


def test_given_B_and_C_and_their_biases():
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn
    xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias = inputs()
    weight = random(DIM, INNER, seed=8)
    B, C = random(2, STATE, LENGTH, seed=10), random(2, 1, STATE, LENGTH, seed=11)
    B_bias, C_bias = random(STATE, seed=12), random(STATE, seed=13)
    x, z = xz.chunk(2, 1)
    x = conv(x, conv_weight[:, 0], conv_bias)
    dt, B_x, C_x = (x_proj @ x).split([RANK, STATE, STATE], 1)

    def call(B, C, *args, **kwargs):  # x_proj has no rows for what is given
        rows = [0, *([] if B is not None else [1, 2, 3]), *([] if C is not None else [4, 5, 6])]
        return mamba_inner_fn(xz, conv_weight, conv_bias, x_proj[rows], dt_proj, weight, None, A,
                              B, C, *args, **kwargs)

    def by_hand(B, C, softplus=True):
        y = scan(x, dt_proj @ dt, A, B, C, D, z, dt_bias, softplus)[0]
        return F.linear(y.transpose(1, 2), weight)

    assert_close(call(B, C, D, dt_bias), by_hand(B, C), 1e-10)
    assert_close(call(B, None, D, dt_bias, None, C_bias),
                 by_hand(B, C_x + C_bias[:, None]), 1e-10)
    assert_close(call(None, None, D, dt_bias, B_bias),
                 by_hand(B_x + B_bias[:, None], C_x), 1e-10)
    assert_close(call(None, None, D, dt_bias, delta_softplus=False),
                 by_hand(B_x, C_x, False), 1e-10)


@pytest.mark.parametrize('name', ['bimamba_inner_fn', 'bimamba_inner_ref'])
def test_bimamba_inner_fn(name):
    """One convolution, forwards; then the same scan in both directions with its own A."""
    import mamba_ssm.ops.selective_scan_interface as interface
    tensors = [*inputs(), random(DIM, INNER, seed=8), -random(INNER, STATE, seed=9).exp()]

    def by_hand(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias, weight, A_b):
        x, z = xz.chunk(2, 1)
        x = conv(x, conv_weight[:, 0], conv_bias)
        dt, B, C = (x_proj @ x).split([RANK, STATE, STATE], 1)
        delta = dt_proj @ dt
        y = scan(x, delta, A, B, C, D, z, dt_bias, True)[0]
        back = scan(*(t.flip(-1) for t in (x, delta)), A_b, B.flip(-1), C.flip(-1), D, z.flip(-1),
                    dt_bias, True)[0]
        return F.linear((y + back.flip(-1)).transpose(1, 2), weight)

    def call(*args):
        *args, weight, A_b = args
        function = getattr(interface, name)
        return in_order(lambda *a, **k: function(*a[:5], weight, None, a[5], A_b, *a[6:], **k),
                        *args)

    assert_same(call, by_hand, tensors)


def test_norms_of_B_C_and_dt_are_refused():
    from mamba_ssm import mamba_inner_fn
    weight = random(DIM, INNER)
    with pytest.raises(NotImplementedError, match='has no norms of B, C and dt'):
        with_out_proj(partial(mamba_inner_fn, b_rms_weight=torch.ones(STATE)), *inputs(), weight,
                      None)


def test_autocast_is_that_of_the_official_functions():
    """xz and the projections in autocast's dtype, A, D and the bias in fp32."""
    from mamba_ssm.ops.selective_scan_interface import (
        mamba_inner_fn,
        mamba_inner_fn_no_out_proj,
        mamba_inner_ref,
    )
    tensors = [t.float() for t in inputs()]
    weight = random(DIM, INNER, seed=8, dtype=torch.float32)
    rounded = [t.bfloat16().double() if i in (0, 3, 4) else t.double()
               for i, t in enumerate(tensors)]
    expected = mix(*rounded)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast('cpu', torch.bfloat16):
        y = in_order(mamba_inner_fn_no_out_proj, *leaves)
        assert y.dtype == torch.bfloat16
        assert_close(y, expected, 2e-2)
        for function in (mamba_inner_fn, mamba_inner_ref):
            out = with_out_proj(function, *leaves, weight, None)
            assert out.dtype == torch.bfloat16
            assert_close(out, F.linear(expected.transpose(1, 2), weight.double()), 2e-2)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert all(g.dtype == t.dtype and g.isfinite().all()
               for g, t in zip(grads, leaves, strict=True))


# --- Mamba ----------------------------------------------------------------------------------------

def mamba(**options):
    from mamba_ssm import Mamba
    torch.manual_seed(0)
    return Mamba(DIM, d_state=STATE, dtype=torch.float64, **options)


def parameters_of(block, suffix=''):
    """Arguments 1 to 7 of :func:`mix` of one direction."""
    conv1d, x_proj, dt_proj = (getattr(block, f'{name}{suffix}')
                               for name in ('conv1d', 'x_proj', 'dt_proj'))
    return (conv1d.weight, conv1d.bias, x_proj.weight, dt_proj.weight,
            -getattr(block, f'A{suffix}_log').double().exp(),
            getattr(block, f'D{suffix}').double(), dt_proj.bias)


def by_equations(block, x):
    xz = block.in_proj(x).transpose(1, 2)
    y = mix(xz, *parameters_of(block))
    if block.bimamba_type in ('v2', 'v3'):
        y = y + mix(xz.flip(-1), *parameters_of(block, '_b')).flip(-1)
    if block.bimamba_type == 'v3':
        slices, length = block.nslices, x.shape[1]
        order = [s * (length // slices) + m for m in range(length // slices) for s in range(slices)]
        visited = mix(xz[..., order], *parameters_of(block, '_s'))
        y = y + visited[..., [order.index(i) for i in range(length)]]
    if block.if_divide_out and block.bimamba_type == 'v2':
        y = y / 2
    y = F.linear(y.transpose(1, 2), block.out_proj.weight, block.out_proj.bias)
    return y if block.init_layer_scale is None else y * block.gamma


OPTIONS = {
    'causal': dict(), 'biases': dict(bias=True, conv_bias=False), 'slow': dict(use_fast_path=False),
    'v2': dict(bimamba_type='v2'), 'mean': dict(bimamba_type='v2', if_divide_out=True),
    'devide': dict(bimamba_type='v2', if_devide_out=True, init_layer_scale=0.1),
    'slow v2': dict(bimamba_type='v2', use_fast_path=False), 'videomamba': dict(bimamba=True),
    'videomamba causal': dict(bimamba=False), 'v3': dict(bimamba_type='v3', nslices=2)}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_mamba_by_its_equations(options, device):
    block = mamba(**options)
    dtype = torch.float64 if device == 'cpu' else torch.float32
    moved = copy.deepcopy(block).to(device, dtype)
    x, grad = random(2, LENGTH, DIM), random(2, LENGTH, DIM, seed=1)
    expected, y = by_equations(block, x), moved(x.to(device, dtype))
    rtol = 1e-6 if device == 'cpu' else 1e-4  # A_log and D are fp32
    assert_close(y.detach().cpu(), expected.detach(), rtol)
    expected.backward(grad)
    y.backward(grad.to(y))
    for (name, p), moved_p in zip(block.named_parameters(), moved.parameters(), strict=True):
        assert_close(moved_p.grad.cpu(), p.grad, 10 * rtol, name)


def test_mixers_of_video_mamba_suite():
    from mamba_ssm.modules.mamba_new import Mamba as DBM
    from mamba_ssm.modules.mamba_simple_scan_norm import Mamba as Normed
    torch.manual_seed(0)
    x, options = random(2, LENGTH, DIM), dict(d_state=STATE, dtype=torch.float64)
    block = DBM(DIM, **options)
    assert block.in_proj.weight.shape == (4 * INNER, DIM) and len(block.state_dict()) == 9
    forward, backward = block.in_proj(x).transpose(1, 2).chunk(2, 1)
    y = torch.cat([mix(forward, *parameters_of(block)),
                   mix(backward.flip(-1), *parameters_of(block)).flip(-1)], 1).transpose(1, 2)
    assert_close(block(x).detach(), block.out_proj(y).detach(), 1e-6)
    with pytest.raises(ValueError, match='cannot decode token by token'):
        block.allocate_inference_cache(1, 1)

    block = Normed(DIM, bimamba_type='v2', if_devide_out=True, **options)
    assert [name for name, _ in block.named_children()][-2:] == ['norm', 'out_proj']
    xz = block.in_proj(x).transpose(1, 2)
    y = mix(xz, *parameters_of(block)) + mix(xz.flip(-1), *parameters_of(block, '_b')).flip(-1)
    y = y.transpose(1, 2)
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(block(x).detach(), block.out_proj(normed).detach(), 1e-6)
    block.if_devide_out = False
    assert_close(block(x).detach(), block.out_proj(y).detach(), 1e-6)


def test_v1_is_bimamba_inner_fn():
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn
    block, x = mamba(bimamba_type='v1', bias=True), random(2, LENGTH, DIM)
    conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias = parameters_of(block)
    expected = bimamba_inner_fn(
        block.in_proj(x).transpose(1, 2), conv_weight, conv_bias, x_proj, dt_proj,
        block.out_proj.weight, block.out_proj.bias, A, -block.A_b_log.double().exp(), D=D,
        delta_bias=dt_bias)
    assert_close(block(x).detach(), expected.detach(), 1e-6)


def test_keys_order_and_initial_values():
    """The order counts for optimizer states, which go by position."""
    from mamba_ssm import Mamba
    block = Mamba(32, bimamba_type='v2', init_layer_scale=0.5, bias=True)
    direction = ['conv1d{}.weight', 'conv1d{}.bias', 'x_proj{}.weight', 'dt_proj{}.weight',
                 'dt_proj{}.bias']
    assert [name for name, _ in block.named_parameters()] == [
        'gamma', 'A_log', 'D', 'A_b_log', 'D_b', 'in_proj.weight', 'in_proj.bias',
        *(name.format('') for name in direction), *(name.format('_b') for name in direction),
        'out_proj.weight', 'out_proj.bias']
    assert torch.equal(block.A_log[7].exp().round(), torch.arange(1., 17)) and (block.D == 1).all()
    steps = F.softplus(block.dt_proj.bias)
    assert 0.99e-3 < steps.min() and steps.max() < 0.101
    assert block.dt_proj.bias._no_reinit and block.A_b_log._no_weight_decay
    assert block.dt_proj.weight.shape == (64, 2) and block.dt_proj.weight.abs().max() <= 2 ** -0.5
    constant = Mamba(16, dt_init='constant', dt_scale=2, dt_rank=4, dt_min=0.5, dt_max=0.5)
    assert (constant.dt_proj.weight == 1).all()
    assert_close(F.softplus(constant.dt_proj.bias).detach(), torch.full((32,), 0.5), 1e-5)


def test_dtypes_and_devices_of_parameters():
    from mamba_ssm import Mamba
    block = Mamba(DIM, bimamba_type='v3', nslices=2, dtype=torch.bfloat16)
    fp32 = {name for name, p in block.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {'A_log', 'D', 'A_b_log', 'D_b', 'A_s_log', 'D_s'}
    y = block(random(1, 4, DIM, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {p.device.type for p in Mamba(DIM, bimamba_type='v1', device='meta').parameters()} == {
        'meta'}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options', [dict(), dict(bimamba_type='v1'), dict(bimamba_type='v2')],
                         ids=str)
def test_mamba_under_autocast(options, device):
    block = mamba(**options).float().to(device)
    x = random(2, LENGTH, DIM, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, block(x).detach(), 3e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize('options, message', [
    (dict(bimamba_type='v4'), r"bimamba_type='v4' does not exist .* choose one of \('none', 'v1'"),
    (dict(dt_init='zeros'), "dt_init='zeros' does not exist; choose 'random' or 'constant'"),
    (dict(nslice=3), 'unexpected keyword argument')])
def test_wrong_options(options, message):
    with pytest.raises(TypeError if 'nslice' in options else ValueError, match=message):
        mamba(**options)


def test_v3_names_a_length_that_it_cannot_slice():
    with pytest.raises(ValueError, match='a multiple of nslices=4, got 6 tokens'):
        mamba(bimamba_type='v3', nslices=4)(random(1, LENGTH, DIM))


def test_hooks_on_the_projections_fire():
    block, seen = mamba(bimamba_type='v2'), []
    for name in ('in_proj', 'out_proj'):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    block(random(1, LENGTH, DIM))
    assert seen == ['in_proj', 'out_proj']


# --- decoding -------------------------------------------------------------------------------------

@pytest.mark.parametrize('prompt', [1, 2, 5])
@pytest.mark.parametrize('cache', ['allocated', 'made'])
def test_tokens_one_by_one(prompt, cache):
    from mamba_ssm.utils.generation import InferenceParams
    block, x = mamba(layer_idx=3, init_layer_scale=2.0), random(2, 9, DIM)
    with torch.no_grad():
        expected = block(x)
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        if cache == 'allocated':
            params.key_value_memory_dict[3] = block.allocate_inference_cache(2, 9)
        outputs = [block(x[:, :prompt], inference_params=params)]
        for t in range(prompt, 9):
            params.seqlen_offset = t
            outputs.append(block(x[:, t:t + 1], inference_params=params))
    assert_close(torch.cat(outputs, 1), expected, 1e-6)
    conv_state, ssm_state = params.key_value_memory_dict[3]
    assert conv_state.shape == (2, INNER, WIDTH) and ssm_state.shape == (2, INNER, STATE)
    assert_close(conv_state, block.in_proj(x)[:, -WIDTH:, :INNER].transpose(1, 2).detach(), 1e-10)
    y, *states = block.step(x[:, :1], conv_state, ssm_state)
    assert y.shape == (2, 1, DIM) and states[0] is conv_state and states[1] is ssm_state
    params.reset(12, 1)
    assert params.seqlen_offset == 0 and params.max_seqlen == 12


def test_what_cannot_decode_says_so():
    from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
    params = InferenceParams(4, 2)
    x = random(2, 1, DIM)
    with pytest.raises(ValueError, match="bimamba_type='v2' reads a sequence in both directions"):
        mamba(bimamba_type='v2', layer_idx=0)(x, params)
    with pytest.raises(ValueError, match='needs a layer_idx'):
        mamba()(x, params)
    with pytest.raises(ValueError, match='one token at a time, got a sequence of 2'):
        mamba(layer_idx=0).step(random(2, 2, DIM), None, None)
    with pytest.raises(NotImplementedError, match='GenerationMixin.generate is not covered'):
        GenerationMixin().generate(None)


def test_models_of_a_folder(tmp_path):
    from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
    (tmp_path / 'config.json').write_text('{"d_model": 8}')
    torch.save({'w': torch.ones(2)}, tmp_path / 'pytorch_model.bin')
    assert load_config_hf(str(tmp_path)) == {'d_model': 8}
    state = load_state_dict_hf(tmp_path, dtype=torch.float16)
    assert state['w'].dtype == torch.float16
    with pytest.raises(RuntimeError, match='config.json does not exist: .* download it first'):
        load_config_hf('state-spaces/mamba-130m')


# --- Block ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('rms', [True, False])
def test_block(rms, fused):
    from mamba_ssm.modules.mamba_simple import Block, Mamba
    from mamba_ssm.ops.triton.layernorm import RMSNorm
    torch.manual_seed(0)
    block = Block(DIM, partial(Mamba, d_state=STATE), partial(RMSNorm if rms else nn.LayerNorm,
                                                              eps=1e-5), fused, True)
    assert [*block.state_dict()][-1] == ('norm.weight' if rms else 'norm.bias')
    x, residual = (random(2, LENGTH, DIM, seed=i, dtype=torch.float32) for i in (0, 1))
    y, total = block(x)
    assert torch.equal(total, x)
    assert_close(y.detach(), block.mixer(block.norm(x)).detach(), 1e-6)
    y, total = block(x, residual)
    assert_close(total, x + residual, 1e-6)
    assert_close(y.detach(), block.mixer(block.norm(x + residual)).detach(), 1e-5)
    states = block.allocate_inference_cache(2, 9, dtype=torch.float16)
    assert states[0].dtype == torch.float16


@pytest.mark.parametrize('fused', [True, False])
def test_block_with_an_mlp(fused):
    from mamba_ssm import Mamba
    from mamba_ssm.modules.block import Block
    torch.manual_seed(0)
    mlp = partial(nn.Linear, out_features=DIM)
    block = Block(DIM, partial(Mamba, d_state=STATE), mlp, fused_add_norm=fused)
    assert [name for name, _ in block.named_children()] == ['norm', 'mixer', 'norm2', 'mlp']
    x, residual = (random(2, LENGTH, DIM, seed=i, dtype=torch.float32) for i in (0, 1))
    y, total = block(x, residual)
    mixed = block.mixer(block.norm(x + residual))
    assert_close(total.detach(), (x + residual + mixed).detach(), 1e-5)
    assert_close(y.detach(), block.mlp(block.norm2(total)).detach(), 1e-5)
    bare = Block(DIM, partial(Mamba, d_state=STATE), nn.Identity, fused_add_norm=fused)
    assert bare.mlp is None and not hasattr(bare, 'norm2')
    assert torch.equal(bare(x)[1], x)


def test_fused_block_wants_a_norm_that_it_knows():
    from mamba_ssm.modules.mamba_simple import Block
    with pytest.raises(ValueError, match='takes an nn.LayerNorm or an RMSNorm, got Identity'):
        Block(DIM, nn.Identity, nn.Identity, fused_add_norm=True)
