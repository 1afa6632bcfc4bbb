"""Causal attention, against the equations one token and head after the other."""

import pytest
import torch

from vmamba_mm.layers import CausalAttention
from vmamba_mm.testing import assert_close

OPTIONS = {
    'plain': dict(num_heads=2),
    'wide': dict(num_heads=3, head_dim=4, qkv_bias=False, out_bias=False),
    'groups': dict(num_heads=4, head_dim=2, num_kv_heads=2),
    'conv_rotary': dict(num_heads=2, head_dim=6, num_kv_heads=1, d_conv=3, rotary_dims=4)}
each_option = pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)


def random_attention(options):
    torch.manual_seed(0)
    return CausalAttention(8, **options).double()


def tokens_of(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, position, dims):
    """Channel i turns with channel i + dims / 2 by position * 10000^(-2i / dims)."""
    y = x.clone()
    for i in range(dims // 2):
        angle = torch.tensor(position * 10000.0 ** (-2 * i / dims), dtype=x.dtype)
        a, b = x[..., i], x[..., i + dims // 2]
        y[..., i] = a * angle.cos() - b * angle.sin()
        y[..., i + dims // 2] = a * angle.sin() + b * angle.cos()
    return y


def by_hand(mixer, tokens):
    heads, kv_heads, P = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    qkv = mixer.in_proj(tokens)
    if mixer.conv1d is not None:
        taps, width = mixer.conv1d.weight[:, 0], mixer.conv1d.weight.shape[-1]
        padded = torch.cat([torch.zeros_like(qkv[:, :1])] * (width - 1) + [qkv], 1)
        qkv = mixer.conv1d.bias + sum(
            padded[:, w:w + qkv.shape[1]] * taps[:, w] for w in range(width))
    q, k, v = qkv.split([heads * P, kv_heads * P, kv_heads * P], -1)
    rows = []
    for t in range(tokens.shape[1]):
        outputs = []
        for h in range(heads):
            of_q = slice(h * P, (h + 1) * P)
            group = h // (heads // kv_heads)
            of_kv = slice(group * P, (group + 1) * P)
            query = rotate(q[:, t, of_q], t, mixer.rotary_dims)
            scores = torch.stack([
                (query * rotate(k[:, s, of_kv], s, mixer.rotary_dims)).sum(-1) / P ** 0.5
                for s in range(t + 1)], -1)
            outputs.append((scores.softmax(-1)[..., None] * v[:, :t + 1, of_kv]).sum(1))
        rows.append(mixer.out_proj(torch.cat(outputs, -1)))
    return torch.stack(rows, 1)


@each_option
def test_attention_is_the_papers(options):
    mixer = random_attention(options)
    for length in (1, 7):
        x = tokens_of(2, length, 8)
        found, expected = mixer(x), by_hand(mixer, x)
        assert_close(found, expected, 1e-6 if mixer.rotary_dims else 1e-10)  # angles are fp32
        grads = [torch.autograd.grad((y * y.detach().cos()).sum(), list(mixer.parameters()))
                 for y in (found, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@each_option
@pytest.mark.parametrize('watched', [False, True])
def test_pieces_are_the_whole(options, watched):
    mixer, x = random_attention(options), tokens_of(2, 9, 8)
    if watched and mixer.conv1d is not None:
        mixer.conv1d.register_forward_hook(lambda *_: None)
    for parts in ([1] * 9, [4, 5], [2, 1, 6]):
        state, outputs = mixer.init_state(2), []
        for piece in x.split(parts, 1):
            y, state = mixer(piece, state)
            outputs.append(y)
        assert_close(torch.cat(outputs, 1), mixer(x), 1e-6 if mixer.rotary_dims else 1e-12)
    y, _ = mixer.step(x[:, 0], mixer.init_state(2))
    assert_close(y, mixer(x)[:, 0], 1e-12)


@each_option
def test_states_of_texts_of_several_lengths(options):
    mixer = random_attention(options)
    texts = [tokens_of(1, length, 8, seed=length) for length in (5, 2, 8)]
    state = mixer.init_state(1).joined([mixer(x, mixer.init_state(1))[1] for x in texts])
    more = tokens_of(3, 3, 8, seed=9)
    y, state = mixer(more[:, :2], state)
    last, _ = mixer.step(more[:, 2], state)
    for i, text in enumerate(texts):
        expected = mixer(torch.cat([text, more[i:i + 1]], 1))[0]
        assert_close(torch.cat([y[i], last[i:i + 1]]), expected[-3:], 1e-6)


@pytest.mark.parametrize('options, message', [
    (dict(num_heads=3), 'num_heads=3 must divide the 8 channels, unless head_dim'),
    (dict(num_heads=4, num_kv_heads=3), 'num_kv_heads=3 must divide num_heads=4'),
    (dict(rotary_dims=3), 'rotary_dims must be even'), (dict(d_conv=1), 'd_conv must be 0 or')])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        CausalAttention(8, **options)
