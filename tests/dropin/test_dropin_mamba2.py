"""The functions of ssd_combined and the blocks of Mamba-2, from their equations."""

import pytest
import torch
import torch.nn.functional as F
from s6_by_hand import conv, gradients, random

from vmamba_mm.layers import Mamba2Mixer
from vmamba_mm.testing import assert_close

#: Channels of a head, their number, groups, state, tokens.
P, HEADS, GROUPS, STATE, LENGTH = 3, 4, 2, 5, 7


def scan(x, dt, A, B, C, D, z, dt_bias, state=None, limit=(0.0, float('inf'))):
    """``mamba_chunk_scan_combined`` with softplus, token by token: result and last state."""
    state = x.new_zeros(len(x), HEADS, P, STATE) if state is None else state
    B, C = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (B, C))
    dt, outputs = F.softplus(dt + dt_bias).clamp(*limit), []
    for t in range(x.shape[1]):
        state = (dt[:, t] * A).exp()[..., None, None] * state \
            + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1) + x * (D if D.dim() == 2 else D[:, None])
    return (y if z is None else y * F.silu(z)), state


def inputs(batch=2):
    """x, dt, A, B, C, D, z, dt_bias."""
    shapes = ((batch, LENGTH, HEADS, P), (batch, LENGTH, HEADS), (HEADS,),
              (batch, LENGTH, GROUPS, STATE), (batch, LENGTH, GROUPS, STATE), (HEADS,),
              (batch, LENGTH, HEADS, P), (HEADS,))
    tensors = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    tensors[2] = -tensors[2].exp()
    return tensors


def in_order(x, dt, A, B, C, D, z, dt_bias, *more, **kwargs):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    return mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, dt_bias, *more, dt_softplus=True,
                                     **kwargs)


def assert_same(function, by_hand, tensors):
    expected, grads = gradients(by_hand, tensors)
    y, found = gradients(function, tensors)
    for i, (a, b) in enumerate(zip([y, *found], [expected, *grads], strict=True)):
        assert_close(a, b, 1e-9, str(i))


def test_mamba_chunk_scan_combined():
    tensors = [*inputs(), random(2, HEADS, P, STATE, seed=9)]
    assert_same(in_order, lambda *args: scan(*args)[0], tensors)
    y, last = in_order(*tensors, return_final_states=True)
    expected, state = scan(*tensors)
    assert_close(y, expected, 1e-10)
    assert_close(last, state, 1e-10)
    limit = (0.4, 0.9)
    assert_close(in_order(*tensors, dt_limit=limit), scan(*tensors, limit)[0], 1e-10)


def test_states_of_packed_sequences():
    tensors = inputs(batch=1)
    x, dt, A, B, C, D, z, dt_bias = tensors
    ends = torch.tensor([0, 2, 3, LENGTH], dtype=torch.int32)
    seq_idx = torch.tensor([[0, 0, 1, 2, 2, 2, 2]], dtype=torch.int32)
    y, last, states = in_order(*tensors, seq_idx=seq_idx, cu_seqlens=ends,
                               return_final_states=True, return_varlen_states=True)
    parts = [scan(x[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], D, z[:, a:b], dt_bias)
             for a, b in ((0, 2), (2, 3), (3, LENGTH))]
    assert_close(y, torch.cat([part[0] for part in parts], 1), 1e-10)
    assert_close(states, torch.cat([part[1] for part in parts]), 1e-10)
    assert_close(last, parts[-1][1], 1e-10)
    two = in_order(*tensors, seq_idx=seq_idx, cu_seqlens=ends, return_varlen_states=True)
    assert len(two) == 2 and torch.equal(two[1], states)
    assert torch.equal(in_order(*tensors, seq_idx=seq_idx, cu_seqlens=ends), y)  # as officially
    for wrong in (dict(), dict(cu_seqlens=ends)):
        with pytest.raises(ValueError, match='takes cu_seqlens and a batch of one row'):
            in_order(*inputs(), return_varlen_states=True, **wrong)


@pytest.mark.parametrize('norm', [None, True, False], ids=['gate', 'before', 'after'])
@pytest.mark.parametrize('mlp', [0, 4])
def test_mamba_split_conv1d_scan_combined(norm, mlp):
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    dim, channels = HEADS * P, HEADS * P + 2 * GROUPS * STATE
    shapes = ((2, LENGTH, 2 * mlp + dim + channels + HEADS), (channels, 3), (channels,), (HEADS,),
              (HEADS,), (HEADS,), (dim,), (5, mlp + dim), (5,))
    tensors = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    tensors[4] = -tensors[4].exp()
    if norm is None:
        tensors[6] = None

    def by_hand(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, weight, out_weight, out_bias):
        gate, value, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, channels, HEADS], -1)
        xBC = conv(xBC.transpose(1, 2), conv_weight, conv_bias).transpose(1, 2)
        x, B, C = xBC.split([dim, GROUPS * STATE, GROUPS * STATE], -1)
        y = scan(x.unflatten(-1, (HEADS, P)), dt, A, B.unflatten(-1, (GROUPS, STATE)),
                 C.unflatten(-1, (GROUPS, STATE)), D, None, dt_bias)[0].flatten(2)
        if norm is not True:
            y = y * F.silu(z)
        if norm is not None:
            groups = y.unflatten(-1, (GROUPS, -1))
            y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(2)
            y = y * weight * (F.silu(z) if norm else 1)
        return F.linear(torch.cat([F.silu(gate) * value, y], -1), out_weight, out_bias)

    def function(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, *rest):
        *weight, out_weight, out_bias = rest
        return mamba_split_conv1d_scan_combined(
            zxbcdt, conv_weight, conv_bias, dt_bias, A, D, 4, headdim=P, ngroups=GROUPS,
            rmsnorm_weight=weight[0], rmsnorm_eps=1e-3, outproj_weight=out_weight,
            outproj_bias=out_bias, norm_before_gate=bool(norm))

    assert_same(function, by_hand, tensors)
    with pytest.raises(ValueError, match='takes headdim where D is of heads alone'):
        mamba_split_conv1d_scan_combined(*tensors[:6], 4)
    out, state = mamba_split_conv1d_scan_combined(*tensors[:6], 4, headdim=P, ngroups=GROUPS,
                                                  return_final_states=True)
    assert out.shape == (2, LENGTH, mlp + dim) and state.shape == (2, HEADS, P, STATE)


# --- the blocks ---------------------------------------------------------------------------------

#: Arguments of Mamba2, and of the layer that tests/layers holds to the same equations.
BLOCKS = {
    'default': (dict(d_state=5, headdim=4), dict(d_state=5, head_dim=4)),
    'groups': (dict(d_state=3, headdim=2, ngroups=3, norm_before_gate=True, D_has_hdim=True,
                    bias=True, conv_bias=False),
               dict(d_state=3, head_dim=2, n_groups=3, norm_before_gate=True, D_has_hdim=True,
                    bias=True, conv_bias=False)),
    'no_norm': (dict(d_state=4, headdim=3, d_conv=2, rmsnorm=False, dt_limit=(0.3, 0.8)),
                dict(d_state=4, head_dim=3, d_conv=2, rmsnorm=False, dt_limit=(0.3, 0.8))),
    'mlp': (dict(d_state=4, headdim=2, expand=3, d_ssm=8, ngroups=2),
            dict(d_state=4, head_dim=2, expand=3, d_ssm=8, n_groups=2))}
each_block = pytest.mark.parametrize('options, layer', BLOCKS.values(), ids=BLOCKS)


def blocks(options, layer):
    """The block of mamba_ssm's name, and the layer with its weights, in fp64."""
    from mamba_ssm import Mamba2
    torch.manual_seed(0)
    block = Mamba2(6, layer_idx=0, **options).double()
    torch.manual_seed(0)
    mixer = Mamba2Mixer(6, **layer)
    for (name, a), (other, b) in zip(block.named_parameters(), mixer.named_parameters(),
                                     strict=True):
        assert name == other and torch.equal(a, b.double()), name
        assert getattr(a, '_no_weight_decay', False) == getattr(b, '_no_weight_decay', False)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(random(*p.shape) * 0.2)
        block.dt_bias += 3
    mixer.double().load_state_dict(block.state_dict())
    return block, mixer


@each_block
def test_block(options, layer):
    block, mixer = blocks(options, layer)
    x = random(2, LENGTH, 6)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4] * 2, dtype=torch.int32)
    grads = []
    for model in (block, mixer):
        y = model(x, seq_idx=seq_idx)
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-9)
    assert_close(block(x), mixer(x), 1e-10)
    assert_close(block(x.flatten(0, 1), seqlen=LENGTH), mixer(x).flatten(0, 1), 1e-10)
    seen = []
    for name in ('in_proj', 'out_proj', *(['norm'] if block.rmsnorm else [])):
        getattr(block, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    block(x)
    assert len(seen) == (3 if block.rmsnorm else 2)


@each_block
@pytest.mark.parametrize('prompt', [1, 2, 6])
def test_decoding(options, layer, prompt):
    from mamba_ssm.utils.generation import InferenceParams
    block, mixer = blocks(options, layer)
    x, cache = random(2, 9, 6), InferenceParams(9, 2)
    outputs = [block(x[:, :prompt], inference_params=cache)]
    for t in range(prompt, 9):
        cache.seqlen_offset = t
        outputs.append(block(x[:, t:t + 1], inference_params=cache))
    assert_close(torch.cat(outputs, 1), mixer(x), 1e-10)
    conv_state, ssm_state = cache.key_value_memory_dict[0]
    assert conv_state.shape == (2, block.conv1d.in_channels, block.d_conv)
    _, state = mixer(x, mixer.init_state(2))
    assert_close(ssm_state, state.ssm, 1e-10)
    assert_close(conv_state[..., 1:], state.conv.transpose(1, 2), 1e-10)


def test_decoding_of_packed_prompts():
    from mamba_ssm.utils.generation import InferenceParams
    block, mixer = blocks(*BLOCKS['groups'])
    x, cache, ends = random(1, 9, 6), InferenceParams(9, 2), [0, 2, 9]
    seq_idx = torch.tensor([[0] * 2 + [1] * 7], dtype=torch.int32)
    block(x, seq_idx=seq_idx, cu_seqlens=torch.tensor(ends), inference_params=cache)
    cache.seqlen_offset, more = 7, random(2, 1, 6, seed=4)
    y = block(more, inference_params=cache)
    for i, (start, end) in enumerate(((0, 2), (2, 9))):
        alone = mixer(torch.cat([x[0, start:end], more[i]])[None])
        assert_close(y[i, 0], alone[0, -1], 1e-10)


@pytest.mark.parametrize('ngroups', [1, 2])
def test_mamba2_simple(ngroups):
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple
    options = dict(d_state=3, learnable_init_states=True, conv_init=0.3)
    torch.manual_seed(0)
    block = Mamba2Simple(6, headdim=3, ngroups=ngroups, **options).double()
    mixer = Mamba2Mixer(6, head_dim=3, n_groups=ngroups, **options).double()
    assert list(block.state_dict()) == list(mixer.state_dict())
    torch.nn.init.normal_(block.init_states)
    mixer.load_state_dict(block.state_dict())
    x = random(2, LENGTH, 6)
    assert_close(block(x), mixer(x), 1e-10)
    assert Mamba2Simple(64).headdim == 128 and Mamba2Simple(64).d_state == 64


def test_half_precision():
    from mamba_ssm import Mamba2
    torch.manual_seed(0)
    block, x = Mamba2(8, d_state=4, headdim=4, layer_idx=0), random(2, LENGTH, 8).float()
    expected = block(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, 0.03)
    half = Mamba2(8, d_state=4, headdim=4, dtype=torch.bfloat16)
    assert half.A_log.dtype == half.dt_bias.dtype == torch.bfloat16
    assert half.D.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('options, error, message', [
    (dict(headdim=5), ValueError, 'headdim=5 must divide the 12 channels'),
    (dict(headdim=4, ngroups=2), ValueError, 'ngroups=2 the heads'),
    (dict(headdim=4, A_init_range=(0, 1)), ValueError, 'A_init_range must be'),
    (dict(headdim=4, process_group=object()), NotImplementedError, 'no tensor parallelism')])
def test_wrong_arguments(options, error, message):
    from mamba_ssm import Mamba2
    with pytest.raises(error, match=message):
        Mamba2(6, **options)
