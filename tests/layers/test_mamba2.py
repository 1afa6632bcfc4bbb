"""The mixer of Mamba-2 and its gated norm, against loops over tokens."""

import math
import warnings

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from vmamba_mm.layers import Mamba2Mixer, MambaBlock, RMSNorm, RMSNormGated
from vmamba_mm.testing import assert_close

#: Every option at a value of its own; D is 12 of 6 channels.
OPTIONS = {
    'default': dict(d_state=5, head_dim=4),
    'groups': dict(d_state=3, head_dim=2, n_groups=3, norm_before_gate=True, D_has_hdim=True,
                   bias=True, conv_bias=False),
    'no_norm': dict(d_state=4, head_dim=3, d_conv=2, rmsnorm=False, dt_limit=(0.3, 0.8)),
    'mlp': dict(d_state=4, head_dim=2, expand=3, d_ssm=8, n_groups=2, d_conv=3, bias=True),
    'init_states': dict(d_state=2, head_dim=6, learnable_init_states=True)}
each_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)


def random_mixer(options, dtype=torch.float64):
    torch.manual_seed(0)
    mixer = Mamba2Mixer(6, **options).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        mixer.dt_bias += 3  # so that dt is around 0.5, and some is clipped
    return mixer


def tokens_of(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norm_by_hand(x, z, weight, group_size, norm_before_gate):
    """One token: (B, C)."""
    x = x if norm_before_gate else x * F.silu(z)
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt()
             for part in x.split(group_size, -1)]
    y = torch.cat(parts, -1) * weight
    return y * F.silu(z) if norm_before_gate else y


def by_hand(mixer, tokens):
    """The official block, one token, head and group after the other: (B, L, C)."""
    batch, heads, P, N, G = (len(tokens), mixer.num_heads, mixer.head_dim, mixer.d_state,
                             mixer.n_groups)
    d_ssm, d_mlp = heads * P, mixer.out_proj.in_features - heads * P
    taps, A = mixer.conv1d.weight[:, 0], -mixer.A_log.exp()
    states = [torch.zeros(batch, P, N).to(tokens) if mixer.init_states is None
              else mixer.init_states[h].expand(batch, P, N) for h in range(heads)]
    window = [torch.zeros(batch, len(taps)).to(tokens)] * taps.shape[1]
    outputs = []
    for token in tokens.unbind(1):
        gate, value, z, xBC, dt = F.linear(token, mixer.in_proj.weight, mixer.in_proj.bias).split(
            [d_mlp, d_mlp, d_ssm, d_ssm + 2 * G * N, heads], -1)
        window = [*window[1:], xBC]
        u = sum(x * taps[:, w] for w, x in enumerate(window))
        u = F.silu(u if mixer.conv1d.bias is None else u + mixer.conv1d.bias)
        x, B, C = u.split([d_ssm, G * N, G * N], -1)
        dt = F.softplus(dt + mixer.dt_bias).clamp(*mixer.dt_limit)
        y = []
        for h in range(heads):
            part, group = slice(h * P, (h + 1) * P), h // (heads // G)
            B_h, C_h = (t[:, group * N:(group + 1) * N] for t in (B, C))
            decay = torch.exp(dt[:, h] * A[h])[:, None, None]
            states[h] = decay * states[h] + dt[:, h, None, None] * x[:, part, None] * B_h[:, None]
            D = mixer.D[part] if len(mixer.D) == d_ssm else mixer.D[h]
            y.append((states[h] * C_h[:, None]).sum(-1) + D * x[:, part])
        y = torch.cat(y, -1)
        y = y * F.silu(z) if mixer.norm is None else norm_by_hand(
            y, z, mixer.norm.weight, d_ssm // G, mixer.norm.norm_before_gate)
        y = torch.cat([F.silu(gate) * value, y], -1)
        outputs.append(F.linear(y, mixer.out_proj.weight, mixer.out_proj.bias))
    return torch.stack(outputs, 1)


def results(mixer, run, x):
    """The result and every gradient."""
    x = x.clone().requires_grad_()
    y = run(x)
    names, leaves = zip(('x', x), *mixer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(y, leaves, tokens_of(*y.shape, seed=2).to(y)),
                    strict=True)) | {'y': y}


@each_option
@pytest.mark.parametrize('length', [1, 2, 11])
def test_mixer_is_the_papers(options, length):
    """With a hook on each submodule as well, of which all are called."""
    mixer, x = random_mixer(options), tokens_of(2, length, 6)
    expected, found = results(mixer, lambda x: by_hand(mixer, x), x), results(mixer, mixer, x)
    calls = set()
    for name, module in mixer.named_modules():
        module.register_forward_hook(lambda *args, name=name: calls.add(name))
    watched = results(mixer, mixer, x)
    assert calls == {name for name, _ in mixer.named_modules()}
    for name, value in expected.items():
        assert_close(found[name], value, 1e-10, name)
        assert_close(watched[name], value, 1e-10, name)


@each_option
@pytest.mark.parametrize('watched', [False, True])
def test_pieces_are_the_whole(options, watched):
    """Tokens read in pieces, shorter than the convolution and alone; states are not changed."""
    mixer, x = random_mixer(options), tokens_of(2, 9, 6)
    if watched:
        mixer.conv1d.register_forward_hook(lambda *_: None)
    expected = mixer(x)
    for parts in ([1] * 9, [4, 5], [2, 1, 6]):
        state, outputs = mixer.init_state(2), []
        for piece in x.split(parts, 1):
            before = [t.clone() for t in state]
            y, new = mixer(piece, state)
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
            outputs, state = [*outputs, y], new
        assert_close(torch.cat(outputs, 1), expected, 1e-12)
        assert state.conv.shape == (2, mixer.d_conv - 1, mixer.conv1d.in_channels)
    y, stepped = mixer.step(x[:, 0], mixer.init_state(2))
    assert_close(y, expected[:, 0], 1e-12)
    assert stepped.ssm.shape == (2, mixer.num_heads, mixer.head_dim, mixer.d_state)


@each_option
@pytest.mark.parametrize('watched', [False, True])
def test_sequences_in_one_row_do_not_see_each_other(options, watched):
    mixer, x = random_mixer({**options, 'learnable_init_states': False}), tokens_of(2, 12, 6)
    if watched:
        mixer.conv1d.register_forward_hook(lambda *_: None)
    rows = [[1, 4, 7], [5, 5, 2]]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row))
                           for row in rows]).int()

    def apart(x):
        return torch.stack([torch.cat([mixer(part[None])[0] for part in tokens.split(row)])
                            for tokens, row in zip(x, rows, strict=True)])

    expected = results(mixer, apart, x)
    found = results(mixer, lambda x: mixer(x, seq_idx=seq_idx), x)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-10, name)
    # What came before belongs to the first sequence, the state afterwards to the last one.
    start = mixer(tokens_of(2, 3, 6, seed=5), mixer.init_state(2))[1]
    y, state = mixer(x, start, seq_idx=seq_idx)
    more = tokens_of(2, 4, 6, seed=6)
    for i, row in enumerate(rows):
        own = type(start)(*(t[i:i + 1] for t in start))
        assert_close(y[i, :row[0]], mixer(x[i:i + 1, :row[0]], own)[0][0], 1e-10)
        assert_close(y[i, row[0]:], expected['y'][i, row[0]:], 1e-10)
        last = torch.cat([x[i, -row[2]:], more[i]])
        assert_close(mixer(more, state)[0][i], mixer(last[None])[0, row[2]:], 1e-10)
    token, _ = mixer(more[:, :1], state, seq_idx=torch.ones(2, 1).int())
    assert_close(token, mixer(more[:, :1]), 1e-10)


@pytest.mark.parametrize('norm_before_gate', [False, True])
@pytest.mark.parametrize('group_size', [None, 2])
def test_gated_norm(group_size, norm_before_gate):
    norm = RMSNormGated(6, group_size, norm_before_gate).double()
    nn.init.normal_(norm.weight)
    x, z = tokens_of(3, 6, seed=1), tokens_of(3, 6, seed=2)
    expected = norm_by_hand(x, z, norm.weight, group_size or 6, norm_before_gate)
    assert_close(norm(x, z), expected, 1e-12)
    plain = norm_by_hand(x, torch.full_like(x, 50.0), norm.weight, group_size or 6, True) / 50
    assert_close(norm(x), plain, 1e-12)
    half = norm.bfloat16()(x.bfloat16(), z.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half, expected, 0.02)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm.float()(x.float(), z.float()).dtype == torch.float32


def test_initial_values_are_as_published():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(64, head_dim=1, A_init_range=(2, 8), dt_min=1e-2, dt_max=0.5,
                        dt_init_floor=0.02, conv_init=0.125, learnable_init_states=True)
    assert mixer.A_log.exp().min() > 2 and mixer.A_log.exp().max() < 8
    dt = F.softplus(mixer.dt_bias)
    assert 0.0199 < dt.min() < 0.0201 and 0.3 < dt.max() < 0.5
    assert 0.1 < mixer.conv1d.weight.abs().max() <= 0.125
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert mixer.init_states.count_nonzero() == 0
    marked = {k for k, p in mixer.named_parameters() if getattr(p, '_no_weight_decay', False)}
    assert marked == {'init_states', 'dt_bias', 'A_log', 'D'}
    assert list(mixer.state_dict()) == [
        'init_states', 'dt_bias', 'A_log', 'D', 'in_proj.weight', 'conv1d.weight', 'conv1d.bias',
        'norm.weight', 'out_proj.weight']


@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision(autocast):
    mixer, x = random_mixer(OPTIONS['default'], torch.float32), tokens_of(2, 9, 6).float()
    expected = mixer(x)
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            y, (pieces, state) = mixer(x), mixer(x, mixer.init_state(2))
            step, _ = mixer.step(x[:, 0], state)
    else:
        mixer, x = mixer.bfloat16(), x.bfloat16()
        y, (pieces, state) = mixer(x), mixer(x, mixer.init_state(2))
        step, _ = mixer.step(x[:, 0], state)
    assert y.dtype == pieces.dtype == step.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    assert_close(y, expected, 0.03)
    assert_close(pieces, expected, 0.03)


@pytest.mark.gpu
@each_option
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_a_gpu(options, dtype):
    """All tokens, pieces and packed sequences, against fp64 on a CPU."""
    mixer, x = random_mixer(options), tokens_of(2, 70, 6)
    seq_idx = (torch.arange(70) // 25).int().expand(2, -1)
    expected = results(mixer, mixer, x)
    packed = mixer(x, seq_idx=seq_idx)
    mixer, x = mixer.to('cuda', dtype), x.to('cuda', dtype)
    found = {name: value.cpu().double() for name, value in results(mixer, mixer, x).items()}
    limit = 1e-4 if dtype == torch.float32 else 0.05
    for name, value in expected.items():
        assert_close(found[name], value, limit if name == 'y' else 4 * limit, name)
    # torch may round a convolution's inputs to TF32.
    assert_close(mixer(x, seq_idx=seq_idx.cuda()).cpu(), packed, max(limit, 2e-3))
    state, outputs = mixer.init_state(2), []
    for piece in x.split([1, 64, 1, 4], 1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1).cpu(), expected['y'], limit)


def test_in_a_block():
    """With gradient checkpointing, and through torch.compile in one graph."""
    torch._dynamo.reset()
    grads, x = [], tokens_of(2, 7, 6)
    for with_cp in (False, True):
        block = MambaBlock(random_mixer(OPTIONS['groups']), RMSNorm(6).double(), with_cp=with_cp)
        hidden, residual = block(x)
        grads.append(torch.autograd.grad((hidden + residual).square().sum(),
                                         list(block.parameters())))
    for found, expected in zip(*grads, strict=True):
        assert torch.equal(found, expected)
    compiled = torch.compile(block.mixer, backend='eager', fullgraph=True)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4] * 2).int()
    assert_close(compiled(x), block.mixer(x), 1e-12)
    assert_close(compiled(x, seq_idx=seq_idx), block.mixer(x, seq_idx=seq_idx), 1e-12)
    torch._dynamo.reset()


@each_option
def test_recording(options):
    """By torch.fx, as extractors of features do, and by torch.jit."""
    mixer, x = random_mixer(options), tokens_of(2, 7, 6)
    recorded = torch.fx.symbolic_trace(mixer, concrete_args=dict(state=None, seq_idx=None))
    assert_close(recorded(x, None, None), mixer(x), 1e-12)
    assert {'in_proj', 'out_proj'} <= {node.target for node in recorded.graph.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it is deprecated, and compares shapes
        recorded = torch.jit.trace(mixer, (x,))
    assert_close(recorded(x + 1), mixer(x + 1), 1e-12)


@pytest.mark.parametrize('options, message', [
    (dict(d_state=0), 'd_state must be at least 1'), (dict(d_conv=1), 'd_conv at least 2'),
    (dict(head_dim=5), 'head_dim=5 must divide the 12 channels'),
    (dict(d_ssm=13), 'd_ssm must be at least 1 and at most expand . embed_dims = 12'),
    (dict(head_dim=4, n_groups=2), 'n_groups=2 must divide the 3 heads'),
    (dict(head_dim=4, dt_limit=(0.5, 0.1)), 'dt_limit must be two numbers'),
    (dict(head_dim=4, dt_limit=(-math.inf, 0.1)), 'dt_limit must be two numbers')])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer(6, **options)
    with pytest.raises(ValueError, match='group_size=4 must divide the 6 channels'):
        RMSNormGated(6, 4)
