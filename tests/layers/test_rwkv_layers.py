"""The layers of RWKV, each alone; tests/models/test_rwkv.py compares them with their equations."""

import pytest
import torch

from vmamba_mm.layers import (
    LayerNorm,
    RWKV4TimeMix,
    RWKV5TimeMix,
    RWKV6TimeMix,
    RWKV7TimeMix,
    RWKVBlock,
    RWKVChannelMix,
)
from vmamba_mm.testing import assert_close

MIXERS = {
    'rwkv4': lambda **kwargs: RWKV4TimeMix(16, att_dims=24, **kwargs),
    'rwkv5': lambda **kwargs: RWKV5TimeMix(16, head_dim=4, att_dims=24, **kwargs),
    'rwkv6': lambda **kwargs: RWKV6TimeMix(16, head_dim=4, mix_rank=3, decay_rank=5, **kwargs),
    'rwkv7': lambda **kwargs: RWKV7TimeMix(16, head_dim=4, decay_rank=3, rate_rank=5, value_rank=2,
                                           gate_rank=7, **kwargs)}
each_mixer = pytest.mark.parametrize('make', MIXERS.values(), ids=MIXERS)


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double()


def tokens_of(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@each_mixer
def test_steps_are_the_whole(make):
    """And leave the state that they are given alone; the values of the first layer come along."""
    mixer, x = randomised(make()), tokens_of(2, 9, 16)
    expected = mixer(x)
    state, ys, values = mixer.init_state(2), [], []
    for token in x.unbind(1):
        before = [t.clone() for t in state]
        y, *value, new = mixer.step(token, state)
        assert all(map(torch.equal, state, before))
        ys, values, state = [*ys, y], values + value, new
    whole, *value, last = mixer(x, mixer.init_state(2))
    assert_close(torch.stack(ys, 1), whole, 1e-11)
    assert_close(whole, expected[0] if isinstance(expected, tuple) else expected, 1e-11)
    for one, right in zip(state, last, strict=True):
        assert_close(one, right, 1e-11)
    if value:
        assert_close(torch.stack(values, 1), value[0], 1e-12)


@pytest.mark.parametrize('version', [4, 5, 6, 7])
def test_channel_mixing_in_pieces(version):
    mixer, x = randomised(RWKVChannelMix(16, 40, version)), tokens_of(2, 9, 16)
    last, ys = mixer.init_state(2), []
    for piece in x.split([1, 5, 3], dim=1):
        y, last = mixer(piece, last)
        ys.append(y)
    assert_close(torch.cat(ys, 1), mixer(x), 1e-12)
    assert torch.equal(last, x[:, -1])


def test_the_first_layer_gives_its_values_to_all_others():
    """Each layer but the first mixes its own with them, and gradients go back to the first."""
    blocks = [randomised(RWKVBlock(
        MIXERS['rwkv7'](layer=i, depth=3), RWKVChannelMix(16, 40, layer=i, depth=3), LayerNorm(16),
        LayerNorm(16))) for i in range(3)]
    given = []
    for block in blocks:
        block.mixer.register_forward_hook(
            lambda _, args, kwargs, out: given.append((kwargs['first_value'], out[1])),
            with_kwargs=True)
    streams = (tokens_of(2, 9, 16),)
    for block in blocks:
        streams = block(*streams)
    assert given[0][0] is None and len(streams) == 3
    assert all(value is given[0][1] for pair in given[1:] for value in pair)
    last = blocks[2].mixer
    assert not hasattr(blocks[0].mixer, 'v1') and last.v1.shape == (16, 2)
    with pytest.raises(ValueError, match='the values of the first layer in all others'):
        last(tokens_of(2, 9, 16))
    with pytest.raises(ValueError, match='none in the first'):
        blocks[0].mixer(tokens_of(2, 9, 16), first_value=tokens_of(2, 9, 16))


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: RWKV6TimeMix(16, head_dim=5), 'head_dim=5 must divide the 16 channels'),
    (lambda: RWKV5TimeMix(16, head_dim=4, att_dims=10), 'head_dim=4 must divide the 10 channels'),
    (lambda: RWKV4TimeMix(16, layer=2, depth=2), 'layer=2 must be one of the 2 layers'),
    (lambda: RWKVChannelMix(16, 40, 3), 'version=3 does not exist; choose 4, 5, 6 or 7'),
    (lambda: RWKVChannelMix(16, 40, layer=1), 'layer=1 must be one of the 1 layers')])
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each_mixer
def test_weight_decay_is_for_linear_layers(make):
    for module in (make(), RWKVChannelMix(16, 40), RWKVChannelMix(16, 40, 5)):
        for name, parameter in module.named_parameters():
            has_decay = name.endswith('.weight') and not name.startswith('ln_x')
            assert has_decay or name.startswith('ln_x') or parameter._no_weight_decay
            assert not (has_decay and hasattr(parameter, '_no_weight_decay'))


@each_mixer
def test_one_channel_and_one_layer(make):
    """What initial values are divided by is not zero then."""
    assert all(p.isfinite().all() for p in make(layer=0, depth=1).parameters())
    tiny = RWKV4TimeMix(1) if make is MIXERS['rwkv4'] else RWKV7TimeMix(1, head_dim=1)
    assert all(p.isfinite().all() for p in tiny.parameters())
