"""The mixers of S6 in one dimension and their block, against loops over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba_mm.layers import (
    BiMambaMixer,
    DecomposedBiMambaMixer,
    LayerNorm,
    MambaBlock,
    MambaMixer,
    RMSNorm,
    SharedBiMambaMixer,
)
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.testing import assert_close

SMALL = dict(d_state=3, d_conv=3, expand=1.5)
MIXERS = {
    'causal': lambda **kw: MambaMixer(6, **SMALL, **kw),
    'sum': lambda **kw: BiMambaMixer(6, **SMALL, **kw),
    'mean': lambda **kw: BiMambaMixer(6, reduce='mean', conv_bias=False, **SMALL, **kw),
    'out_norm': lambda **kw: BiMambaMixer(6, out_norm=True, bias=True, **SMALL, **kw),
    'shared': lambda **kw: SharedBiMambaMixer(6, layer_scale=0.1, **SMALL, **kw),
    'decomposed': lambda **kw: DecomposedBiMambaMixer(6, dt_rank=2, **SMALL, **kw)}
each_mixer = pytest.mark.parametrize('make', MIXERS.values(), ids=MIXERS)


def random_mixer(make, **kwargs):
    torch.manual_seed(0)
    mixer = make(**kwargs).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mixer


def scan_by_hand(u, dt, A, B, C, D, z):
    """Tokens (B, L, D) one after the other."""
    state, outputs = torch.zeros(*u[:, 0].shape, A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state \
            + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y = (state * C[:, t, None]).sum(-1) + D * u[:, t]
        outputs.append(y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(outputs, 1)


def convolve_by_hand(x, conv):
    width, u = conv.weight.shape[-1], torch.zeros_like(x)
    for t in range(x.shape[1]):
        for tap in range(width):
            if t - width + 1 + tap >= 0:
                u[:, t] = u[:, t] + conv.weight[:, 0, tap] * x[:, t - width + 1 + tap]
    u = u if conv.bias is None else u + conv.bias
    return u * torch.sigmoid(u)


def project_by_hand(mixer, u, suffix=''):
    rank, state = mixer.dt_rank, mixer.d_state
    dt, B, C = (u @ getattr(mixer, f'x_proj{suffix}').weight.T).split([rank, state, state], -1)
    dt_proj = getattr(mixer, f'dt_proj{suffix}')
    return F.softplus(dt @ dt_proj.weight.T + dt_proj.bias), B, C


def direction_by_hand(mixer, x, z, suffix=''):
    u = convolve_by_hand(x, getattr(mixer, f'conv1d{suffix}'))
    dt, B, C = project_by_hand(mixer, u, suffix)
    return scan_by_hand(u, dt, -getattr(mixer, f'A{suffix}_log').exp(), B, C,
                        getattr(mixer, f'D{suffix}'), z)


def mix_by_hand(mixer, tokens):
    xz = tokens @ mixer.in_proj.weight.T
    xz = xz if mixer.in_proj.bias is None else xz + mixer.in_proj.bias
    x, z, *backward = xz.chunk(mixer.in_proj.out_features // mixer.inner_dims, -1)
    if isinstance(mixer, SharedBiMambaMixer):
        u = convolve_by_hand(x, mixer.conv1d)
        dt, B, C = project_by_hand(mixer, u)
        y = scan_by_hand(u, dt, -mixer.A_log.exp(), B, C, mixer.D, z)
        y = y + scan_by_hand(*(t.flip(1) if t.dim() == 3 else t for t in (
            u, dt, -mixer.A_b_log.exp(), B, C, mixer.D, z))).flip(1)
    elif isinstance(mixer, DecomposedBiMambaMixer):
        y = torch.cat([direction_by_hand(mixer, x, z),
                       direction_by_hand(mixer, *(t.flip(1) for t in backward)).flip(1)], -1)
    else:
        y = direction_by_hand(mixer, x, z)
        if isinstance(mixer, BiMambaMixer):
            y = y + direction_by_hand(mixer, x.flip(1), z.flip(1), '_b').flip(1)
            y = y / 2 if mixer.reduce == 'mean' else y
            if mixer.norm is not None:
                y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    y = y @ mixer.out_proj.weight.T
    y = y if mixer.out_proj.bias is None else y + mixer.out_proj.bias
    return y if mixer.gamma is None else y * mixer.gamma


def results(mixer, run, x):
    """The result and every gradient."""
    x = x.clone().requires_grad_()
    y = run(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    names, leaves = zip(('x', x), *mixer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y, leaves, grad), strict=True)) | {'y': y}


# --- mixers -------------------------------------------------------------------------------------

@each_mixer
@pytest.mark.parametrize('length', [1, 2, 7])
def test_mixers_are_the_papers(make, length):
    """As one op, and step by step where each submodule has a hook."""
    mixer = random_mixer(make)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    expected = results(mixer, lambda x: mix_by_hand(mixer, x), x)
    found = results(mixer, mixer, x)
    calls = []
    for name, module in mixer.named_modules():
        module.register_forward_hook(lambda *args, name=name: calls.append(name))
    hooked = results(mixer, mixer, x)
    assert set(calls) == {name for name, _ in mixer.named_modules()}
    for name, value in expected.items():
        assert_close(found[name], value, 1e-12, name)
        assert_close(hooked[name], value, 1e-12, f'{name}, step by step')


@pytest.mark.parametrize('name', ['conv1d', 'x_proj', 'dt_proj', 'conv1d_b', 'x_proj_b',
                                  'dt_proj_b'])
def test_another_module_may_stand_in(name):
    """As adapters do, which run the module inside."""
    class Doubled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return 2 * self.module(x)

    mixer = random_mixer(MIXERS['sum'])
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    module = getattr(mixer, name)
    setattr(mixer, name, Doubled(module))
    found = mixer(x)
    setattr(mixer, name, module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    assert_close(found, mixer(x), 1e-12)


@pytest.mark.parametrize('is_watched', [False, True], ids=['plain', 'watched'])
@pytest.mark.parametrize('parts', [(1, 8), (6, 3), (4, 1, 4)], ids=str)
def test_tokens_in_parts(is_watched, parts):
    """Calls with a state, and one token at a time, are the whole sequence."""
    mixer = random_mixer(MIXERS['causal'])
    if is_watched:
        mixer.conv1d.register_forward_hook(lambda *args: None)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    state, outputs = mixer.init_state(2), []
    for part in x.split(parts, dim=1):
        y, state = mixer(part, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), mixer(x), 1e-12)
    stepped, outputs = mixer.init_state(2), []
    for token in x.unbind(1):
        before = [t.clone() for t in stepped]
        y, new = mixer.step(token, stepped)
        assert all(torch.equal(*pair) for pair in zip(before, stepped, strict=True))
        stepped = new
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), mixer(x), 1e-12)
    for one, other in zip(stepped, state, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float64
        assert_close(one, other, 1e-12)


@each_mixer
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision(make, dtype):
    torch.manual_seed(0)
    mixer, x = make(), torch.randn(2, 5, 6)
    exact = mixer(x)
    with torch.autocast('cpu', dtype):
        cast = mixer(x)
    half = mixer.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    for y in (cast, half):
        assert_close(y, exact, 0.03)


def test_states_of_a_half_are_fp32():
    mixer = MIXERS['causal']().half()
    state = mixer.init_state(2)
    x = torch.randn(2, 3, 6).half()
    for y, new in (mixer(x, state), mixer.step(x[:, 0], state)):
        assert y.dtype == new.conv.dtype == torch.float16 and new.ssm.dtype == torch.float32
        assert new.conv.shape == (2, 2, 9) and new.ssm.shape == (2, 9, 3)


def test_initial_values():
    torch.manual_seed(0)
    mixer = BiMambaMixer(64, layer_scale=0.5)
    assert (mixer.inner_dims, mixer.dt_rank, mixer.conv1d.weight.shape) == (128, 4, (128, 1, 4))
    for suffix in ('', '_b'):
        dt = F.softplus(getattr(mixer, f'dt_proj{suffix}').bias)
        assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
        assert 0.4 < getattr(mixer, f'dt_proj{suffix}').weight.abs().max() <= 0.5
        assert torch.allclose(getattr(mixer, f'A{suffix}_log').exp(), torch.arange(1., 17))
        assert (getattr(mixer, f'D{suffix}') == 1).all()
    assert mixer.in_proj.bias is None and (mixer.gamma == 0.5).all()


@pytest.mark.parametrize('make, message', [
    (lambda: MambaMixer(6, expand=0.1), 'expand must be at least 1/6 for 6 channels, got 0.1'),
    (lambda: MambaMixer(6, d_state=0), 'd_state must be at least 1'),
    (lambda: MambaMixer(6, d_conv=1), 'd_conv at least 2'),
    (lambda: MambaMixer(6, dt_rank='full'), "dt_rank must be 'auto' or an int of at least 1"),
    (lambda: BiMambaMixer(6, reduce='max'), "reduce='max' does not exist; choose 'sum' or 'mean'")])
def test_wrong_values_name_the_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the block ----------------------------------------------------------------------------------

@pytest.mark.parametrize('norm', [RMSNorm, LayerNorm, lambda dim: nn.Identity()])
def test_block_is_add_norm_mixer(norm):
    torch.manual_seed(0)
    block = MambaBlock(MambaMixer(6, **SMALL), norm(6)).double()
    hidden, residual = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    for before in (None, residual):
        total = hidden if before is None else hidden + before
        for found in (block(hidden, before), block(hidden, before, with_output=True)):
            assert_close(found[1], total, 1e-12)
            for output in (found[0], *found[2:]):
                assert_close(output, block.mixer(block.norm(total)), 1e-12)
    state, outputs = block.mixer.init_state(2), []
    for one, other in zip(hidden.unbind(1), residual.unbind(1), strict=True):
        y, total, state = block.step(one, other, state)
        outputs.append(torch.stack([y, total], -1))
    found = torch.stack(outputs, 1).unbind(-1)
    *whole, whole_state = block(hidden, residual, state=block.mixer.init_state(2))
    for one, other in zip((*found, *state), (*whole, *whole_state), strict=True):
        assert_close(one, other, 1e-12)


def test_a_layer_norm_without_bias_is_no_rms_norm():
    norm, x = LayerNorm(6), torch.randn(2, 2, 5, 6)
    norm.bias = None
    expected = F.layer_norm(x[0] + x[1], (6,))
    assert_close(norm(x[0] + x[1]), expected, 1e-6)
    total, normed = sum_and_norm(norm, *x)
    assert_close(normed, expected, 1e-6)
    assert torch.equal(total, x[0] + x[1])


@pytest.mark.parametrize('cast', [False, True], ids=['half', 'autocast'])
def test_the_residual_stream_is_fp32(cast):
    block = MambaBlock(MambaMixer(6, **SMALL), RMSNorm(6))
    x, seen = torch.randn(2, 5, 6), []
    block.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    if not cast:
        block, x = block.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16, enabled=cast):
        hidden, residual = block(x)
        hidden, residual = block(hidden, residual)
    assert (hidden.dtype, residual.dtype) == (torch.bfloat16, torch.float32)
    assert seen == [torch.bfloat16] * 2


def test_block_drops_paths_and_recomputes():
    torch.manual_seed(0)
    block = MambaBlock(MambaMixer(6, **SMALL), RMSNorm(6), drop_path=0.5)
    x = torch.randn(64, 3, 6, requires_grad=True)
    hidden, _, output = block(x, with_output=True)
    dropped = (hidden == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54 and (output != 0).any(-1).all()
    torch.testing.assert_close(hidden[~dropped], 2 * output[~dropped])
    block.eval()
    assert torch.equal(block(x)[0], output)
    block.train()
    grads = []
    for block.with_cp in (False, True):
        torch.manual_seed(1)
        hidden, residual = block(x, x)
        grads.append(torch.autograd.grad((hidden * residual).sum(), [x, *block.parameters()]))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
