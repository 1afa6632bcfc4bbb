"""What is special about RMT; tests/families/rmt.py has the rest."""

import argparse

import pytest
import torch
from torch import nn

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.heads import TokenLabelHead
from vmamba_mm.models import RMT
from vmamba_mm.models.projected import MapProjection
from vmamba_mm.models.rmt import ManhattanAttention, make_decay, place
from vmamba_mm.ops.masa.reference import masa
from vmamba_mm.testing import Classifier, assert_close

ARCH = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 3),
            mlp_ratios=(2, 2, 2, 2))


# --- attention ------------------------------------------------------------------------------------

def by_hand(attention, decay, x):
    """Section 3 of the paper, with queries and keys as complex numbers that turn."""
    heads, (height, width) = attention.num_heads, x.shape[1:3]
    q, k, v = (linear(x).unflatten(-1, (heads, -1)) for linear in (
        attention.q_proj, attention.k_proj, attention.v_proj))
    rates = 10000 ** -torch.linspace(0, 1, q.shape[-1] // 2, dtype=torch.float64)
    angles = torch.arange(height * width)[:, None] * rates
    turn = torch.polar(torch.ones_like(angles), angles).view(height, width, 1, -1)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for t in (q, k))
    y = masa(q, k, v, decay, attention.form).flatten(3)
    beside = attention.lepe(attention.v_proj(x).movedim(-1, 1)).movedim(1, -1)
    return attention.out_proj(y + beside)


@pytest.mark.parametrize('form', ['decomposed', 'whole'])
def test_attention_is_that_of_the_paper(form):
    torch.manual_seed(0)
    attention = ManhattanAttention(8, 2, form).double()
    decay = make_decay(2).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found = attention(x, place(x, decay, 4, form))
    assert_close(found, by_hand(attention, decay, x), 1e-12)


def test_decays_are_spread_over_the_heads():
    torch.testing.assert_close(make_decay(4, init_value=2, heads_range=4).exp(),
                               torch.tensor([3 / 4, 7 / 8, 15 / 16, 31 / 32]))


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match='num_heads=4 must leave each head an even number of the '
                                         '12 channels'):
        ManhattanAttention(12, 4, 'whole')


def test_half_models_turn_by_exact_positions():
    """Of 24x24 pixels the last is the 575th, which bf16 cannot tell from the 576th."""
    decay, x = make_decay(2), torch.zeros(1, 24, 24, 16)
    exact = place(x, decay, 8, 'decomposed')
    half = place(x.bfloat16(), decay.bfloat16(), 8, 'decomposed')
    assert torch.equal(exact.turns, half.turns)


# --- outputs --------------------------------------------------------------------------------------

def test_projection_and_last_map():
    torch.manual_seed(0)
    model, x = RMT(ARCH, (3,), projection=32, with_last_map=True).eval(), torch.randn(1, 3, 64, 40)
    last_map, projected = model(x)
    assert last_map.shape == (1, 24, 2, 2) and projected.shape == (1, 32, 2, 2)
    assert model.num_features == [8, 16, 16, 32] and last_map.is_contiguous()
    torch.testing.assert_close(model.norm3(last_map), projected)
    assert isinstance(model.norm3, MapProjection)


@pytest.mark.parametrize('options, message', [
    (dict(projection=0), 'projection must be an int of at least 1, or None, got 0'),
    (dict(projection=8, out_indices=(0, 2)), r'out_indices=\(0, 2\) lacks'),
    (dict(with_last_map=True, out_indices=(1,)), r'out_indices=\(1,\) lacks')])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        RMT(ARCH, **options)


def test_layer_scales_decay_like_weights():
    """They have four dimensions, as published."""
    model = RMT(dict(ARCH, layer_scales=(0, 0, 1e-6, 1e-6)))
    assert model.stages[0].blocks[0].gamma_1 is None
    gamma = model.stages[2].blocks[0].gamma_2
    assert gamma.shape == (1, 1, 1, 16) and (gamma == 1e-6).all()


# --- files ----------------------------------------------------------------------------------------

def training_file(path, model, model_ema):
    """As the authors' scripts save it, with the arguments of the command line."""
    torch.save(dict(model=model, model_ema=model_ema, optimizer={}, lr_scheduler={}, epoch=299,
                    scaler={}, args=argparse.Namespace(lr=5e-4), max_accuracy=84.1), path)
    return str(path)


def official(classifier):
    """With the table of the rotation, which our model makes by itself."""
    return to_official(classifier.state_dict()) | {
        f'layers.{i}.Relpos.angle': torch.ones(4) for i in range(4)}


@pytest.mark.parametrize('weights', ['auto', 'model', 'model_ema'])
def test_official_training_files(weights, tmp_path):
    raw, averaged = (Classifier(RMT(ARCH, (3,), projection=32), 5) for _ in range(2))
    file = training_file(tmp_path / 'a.pth', official(raw), official(averaged))
    model = RMT(ARCH, (3,), projection=32)
    model.load_pretrained(file, weights=weights)
    expected = (raw if weights == 'model' else averaged).backbone.state_dict()
    assert all(map(torch.equal, model.state_dict().values(), expected.values()))
    dense = RMT(ARCH)  # whose norms start anew
    dense.load_pretrained(file, weights=weights)
    assert all(torch.equal(v, expected[k]) for k, v in dense.state_dict().items()
               if not k.startswith('norm'))
    assert (dense.norm3.weight == 1).all()
    with pytest.raises(UserError, match='does not fit the model'):
        RMT(dict(ARCH, mlp_ratios=(3, 2, 2, 2))).load_pretrained(file)


@pytest.mark.parametrize('dims', [24, 32], ids=['map', 'projected'])
def test_files_with_token_labels(dims, tmp_path):
    """Their second head is ignored by a backbone, whatever it reads (the released ones may read
    the projected map, which the authors' code cannot load)."""
    classifier = Classifier(RMT(ARCH, (3,), projection=32, with_last_map=True), 5,
                            head=TokenLabelHead(5, 32, dims))
    state = official(classifier)
    assert state['aux_head.weight'].shape == (5, dims)
    file = training_file(tmp_path / 'a.pth', state, state)
    model = RMT(ARCH, (3,), projection=32)
    model.load_pretrained(file)
    assert torch.equal(model.norm3.proj.weight, classifier.backbone.norm3.proj.weight)


def test_a_classifier_without_its_projection_is_refused():
    model = RMT(ARCH, (3,), projection=32)
    state = {k: v for k, v in model.state_dict().items() if k != 'norm3.proj.weight'}
    with pytest.raises(UserError, match='norm3.proj.weight is missing'):
        nn.ModuleDict(dict(backbone=model)).load_state_dict(
            {f'backbone.{k}': v for k, v in state.items()})


def test_decays_of_a_file_are_kept():
    model, other = RMT(ARCH), RMT(dict(ARCH, init_values=(3, 3, 3, 3)))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.stages[0].decay.exp(),
                               torch.tensor([7 / 8, 31 / 32]))
