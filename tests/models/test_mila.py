"""What is special about MILA; tests/families/mila.py has the rest."""

import pytest
import torch
from torch import nn

from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError
from vmamba_mm.models import MILA
from vmamba_mm.models.mila import MILADownsample, MILAMixer, MILAStem
from vmamba_mm.ops.rotation import map_rotation_table
from vmamba_mm.testing import assert_close

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1))


# --- the mixer ------------------------------------------------------------------------------------

def turned(x):
    """All channels of a map (B, H, W, C), as complex numbers: halves by rows and by columns."""
    height, width, dim = x.shape[1:]
    rates = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = (torch.arange(height)[:, None] * rates)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width)[:, None] * rates)[None].expand(height, -1, -1)
    angles = torch.cat((rows, columns), -1)
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def by_hand(mixer, x):
    """Figure 3 of the paper, head by head: every token sees every other."""
    gate = nn.functional.silu(mixer.act_proj(x))
    v = nn.functional.silu(mixer.conv2d(mixer.in_proj(x).movedim(-1, 1))).movedim(1, -1)
    q, k = (nn.functional.elu(t) + 1 for t in mixer.qk(v).chunk(2, -1))
    heads, size = [], x.shape[-1] // mixer.num_heads
    for h in range(mixer.num_heads):
        own = slice(h * size, (h + 1) * size)
        plain_q, plain_k, turned_q, turned_k, values = (
            t.flatten(1, 2)[..., own] for t in (q, k, turned(q), turned(k), v))
        count = values.shape[1]
        total = (plain_q @ plain_k.mT / count).sum(-1, keepdim=True) + 1e-6
        heads.append(turned_q @ turned_k.mT / count @ values / total)
    y = torch.cat(heads, -1).view(x.shape)
    return mixer.out_proj((y + mixer.lepe(v.movedim(-1, 1)).movedim(1, -1)) * gate)


@pytest.mark.parametrize('heads', [1, 2, 4, 8])  # of 8 heads, each pair lies in two
def test_mixer_is_that_of_the_paper(heads):
    torch.manual_seed(0)
    mixer = MILAMixer(8, heads).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turns = map_rotation_table(3, 5, 8, endpoint=False, dtype=x.dtype).flatten(0, 1)
    assert_close(mixer(x, turns), by_hand(mixer, x), 1e-12)
    mixer.conv2d.register_forward_hook(lambda *args: None)  # then the convolution is called
    assert_close(mixer(x, turns), by_hand(mixer, x), 1e-12)


def test_order_of_tokens_matters_by_the_rotation_alone():
    """Without it, and the convolutions, a permutation of the pixels permutes the result."""
    torch.manual_seed(0)
    mixer = MILAMixer(8, 2).double()
    nn.init.zeros_(mixer.lepe.weight)
    with torch.no_grad():
        mixer.conv2d.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    x, order = torch.randn(1, 1, 6, 8, dtype=torch.float64), torch.randperm(6)
    still = torch.ones(6, 4, 2, dtype=torch.float64) * torch.tensor([1.0, 0.0])
    assert_close(mixer(x[:, :, order], still), mixer(x, still)[:, :, order], 1e-12)
    turns = map_rotation_table(1, 6, 8, endpoint=False, dtype=x.dtype).flatten(0, 1)
    assert (mixer(x[:, :, order], turns) - mixer(x, turns)[:, :, order]).abs().max() > 1e-3


# --- sizes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(5, 7), (6, 8), (9, 1)])
def test_padding_is_part_of_the_published_model(size):
    """As if the image, or the map, had had these zeros: they are none after the first layers."""
    torch.manual_seed(0)
    stem, down = MILAStem(3, 8).eval(), MILADownsample(8).eval()
    image, map_ = torch.randn(1, 3, *size), torch.randn(1, *size, 8)
    height, width = size
    padded = nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
    torch.testing.assert_close(stem(image), stem(padded))
    even = nn.functional.pad(map_, (0, 0, 0, width % 2, 0, height % 2))
    torch.testing.assert_close(down(map_), down(even))


def test_position_embedding_is_resized():
    torch.manual_seed(0)
    square, wide = (MILA(dict(ARCH, image_size=size)).eval() for size in (32, (16, 64)))
    assert square.pos_embed.shape == (1, 64, 8) and wide.grid == (4, 16)
    wide.load_state_dict(square.state_dict())  # as many positions as the square has
    smaller = MILA(dict(ARCH, image_size=16)).eval()
    smaller.load_state_dict(smaller.adapt_weights(square.state_dict()))
    expected = nn.functional.interpolate(
        square.pos_embed.unflatten(1, (8, 8)).permute(0, 3, 1, 2), (4, 4), mode='bicubic')
    torch.testing.assert_close(smaller.pos_embed, expected.flatten(2).mT)
    image = torch.randn(1, 3, 16, 16)
    for one, other in zip(smaller(image), square(image), strict=True):
        torch.testing.assert_close(one, other)


# --- official files -------------------------------------------------------------------------------

NAME = 'layers.0.blocks.0.attn.rope.rotations'


@pytest.fixture
def official():
    from families.mila import SPEC
    state, = SPEC.official(MILA(dict(ARCH)))
    return state


def test_tables_of_files_are_compared_and_left_out(official):
    assert NAME in official and not any('rotations' in k for k in to_mm(official))
    rounded = official | {NAME: official[NAME] + 5e-6}  # as of averages
    assert set(to_mm(rounded)) == set(to_mm(official))
    assert to_mm(official | {NAME: official[NAME].half()})


@pytest.mark.parametrize('table, message', [
    (torch.ones(16, 16, 4, 2), r'rotations is up to .* off the table that a MILA computes'),
    (torch.full((16, 16, 4, 2), torch.nan), 'rotations is up to nan off the table'),
    (torch.ones(16, 16, 4), r'of shape \(16, 16, 4\) is not the table')])
def test_tables_of_another_variant_are_refused(official, table, message):
    with pytest.raises(UserError, match=message):
        to_mm(official | {NAME: table})
