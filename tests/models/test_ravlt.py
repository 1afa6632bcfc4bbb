"""What is special about RAVLT; tests/families/ravlt.py has the rest."""

import pytest
import torch
from torch import nn

from vmamba_mm.checkpoints.names import to_mm, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES
from vmamba_mm.models import RAVLT
from vmamba_mm.models.projected import MapProjection
from vmamba_mm.models.ravlt import GatedAttention
from vmamba_mm.ops.rotation import map_rotation_table
from vmamba_mm.testing import Classifier, assert_close

ARCH = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))


# --- attention ------------------------------------------------------------------------------------

def turned(x):
    """A head of a map (B, H, W, P), as complex numbers: halves by rows and by columns."""
    height, width, dim = x.shape[1:]
    rates = 10000 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    rows = (torch.arange(height)[:, None] * rates)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width)[:, None] * rates)[None].expand(height, -1, -1)
    angles = torch.cat((rows, columns), -1)
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).flatten(1, 2)


def by_hand(attention, x):
    """Section 3 of the paper, head by head: every token sees every other."""
    q, k, v, gate = attention.qkvo(x).chunk(4, -1)
    heads, size = [], x.shape[-1] // attention.num_heads
    for h in range(attention.num_heads):
        own = slice(h * size, (h + 1) * size)
        one_q, one_k, one_v = q[..., own], k[..., own], v[..., own].flatten(1, 2)
        if attention.kind == 'softmax':
            scores = turned(one_q) @ turned(one_k).mT * size ** -0.5
            heads.append(scores.softmax(-1) @ one_v)
            continue
        one_q, one_k = nn.functional.elu(one_q) + 1, nn.functional.elu(one_k) + 1
        flat_q, flat_k = one_q.flatten(1, 2), one_k.flatten(1, 2)
        weights = (flat_q.mean(1, keepdim=True) @ flat_k.mT * size ** -0.5).softmax(-1)
        total = (flat_q @ flat_k.mT * weights).sum(-1, keepdim=True) + 1e-6
        heads.append(turned(one_q) @ turned(one_k).mT * weights @ one_v / total)
    y = torch.cat(heads, -1).view(x.shape)
    return attention.proj((y + attention.lepe(v.movedim(-1, 1)).movedim(1, -1)) * gate)


@pytest.mark.parametrize('kind', ['linear', 'softmax'])
@pytest.mark.parametrize('heads', [1, 2, 4])
def test_attention_is_that_of_the_paper(kind, heads):
    torch.manual_seed(0)
    attention = GatedAttention(16, heads, kind).double()
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    table = map_rotation_table(3, 5, 16 // heads, endpoint=True, dtype=x.dtype)
    turns = table.flatten(0, 1).repeat(1, heads, 1)
    assert_close(attention(x, turns), by_hand(attention, x), 1e-12)


def test_kinds_of_attention():
    def kinds(arch):
        with torch.device('meta'):
            model = RAVLT(arch)
        return [[block.attn.kind for block in stage.blocks] for stage in model.stages]

    published = kinds('large')
    assert published == [['linear'] * 4, ['linear'] * 7, ['softmax'] * 19, ['softmax'] * 8]
    mixed = dict(base='tiny', attentions=('softmax', ('linear', 'softmax'), 'linear', 'linear'))
    assert kinds(mixed) == [['softmax'] * 2, ['linear', 'softmax'], ['linear'] * 6, ['linear'] * 2]


# --- outputs, and official files ------------------------------------------------------------------

def test_projection_is_the_norm_of_the_last_output():
    model = RAVLT(ARCH, out_indices=(0, 3), projection=40)
    assert model.num_features == [8, 16, 16, 40]
    assert isinstance(model.norm3, MapProjection) and model.norm0.eps == 1e-6
    assert [m.shape[1] for m in model(torch.randn(2, 3, 32, 32))] == [8, 40]
    with pytest.raises(ValueError, match='projection is of the last stage'):
        RAVLT(ARCH, out_indices=(0, 2), projection=40)
    with pytest.raises(ValueError, match='projection must be an int of at least 1'):
        RAVLT(ARCH, projection=0)


def test_official_shapes_come_back():
    """Of 1x1 convolutions, the head's too, and of the factors of maps with the channels first."""
    classifier = Classifier(RAVLT(ARCH, out_indices=(3,), projection=32), 10)
    state = to_official(classifier.state_dict())
    assert state['head.weight'].shape == (10, 32, 1, 1) and state['proj.weight'].dim() == 4
    assert state['layers.0.blocks.0.gamma_1'].shape == (1, 8, 1, 1)
    assert state['layers.0.blocks.0.attn.qkvo.weight'].shape == (32, 8, 1, 1)
    back = to_mm(state)
    assert set(back) == set(classifier.state_dict())
    for key, value in classifier.state_dict().items():
        assert torch.equal(back[key], value), key


def test_angles_of_files_are_compared_and_left_out():
    from families.ravlt import SPEC
    state, = SPEC.official(RAVLT(ARCH))
    name = 'layers.0.RoPE.angle'
    assert len(to_mm(state)) == len(state) - 4
    usual = 10000 ** (-torch.arange(2) / 2)  # the rates of MILA, without the end point
    with pytest.raises(UserError, match=r'RoPE.angle is up to 9.9e-03 off the table that a RAVLT'):
        to_mm(state | {name: usual.repeat_interleave(2)})
    with pytest.raises(UserError, match='angle of shape .* is not the table'):
        to_mm(state | {name: torch.ones(3)})


def test_one_family_of_two_with_the_same_stem():
    assert FAMILIES['rmt'].rows(())[:8] == FAMILIES['ravlt'].rows(())[:8]
