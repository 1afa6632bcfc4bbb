"""Official names and shapes to ours and back, and what is told from them."""

import json

import pytest
import torch
from official import (
    S1,
    S2,
    SHARED,
    VANILLA,
    classifier_state,
    dense_state,
    random_backbone,
)

from vmamba_mm.checkpoints.compare import differences, explain_differences
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.models import VMamba

ARCHS = {'s1': S1, 's2': S2, 'vanilla': VANILLA}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture(params=ARCHS)
def arch(request):
    return ARCHS[request.param]


@pytest.mark.parametrize('generation', [1, 2])
@pytest.mark.parametrize('linear_4d', [False, True])
@pytest.mark.parametrize('wrapper', ['', 'module.', 'model.', 'module.model.'])
def test_classifier(arch, generation, linear_4d, wrapper):
    model = random_backbone(arch, (3,))
    official = classifier_state(model, 10, generation, linear_4d)
    head = 'head' if generation == 1 else 'classifier.head'
    weight, bias = official[f'{head}.weight'], official[f'{head}.bias']
    wrapped = {wrapper + k: v for k, v in official.items()}
    wrapped[f'{wrapper}total_ops'] = wrapped['layers.0.total_params'] = torch.zeros(1)
    found = to_mm(wrapped)
    expected = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    expected |= {'head.fc.weight': weight, 'head.fc.bias': bias}
    assert set(found) == set(expected)
    assert not differences(expected, found)
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert infer_task(found) == 'cls'


@pytest.mark.parametrize('generation', [1, 2])
@pytest.mark.parametrize('heads', [
    {'neck.lateral_convs.0.conv.weight': (4, 8, 1, 1), 'rpn_head.rpn_cls.weight': (3, 4, 1, 1),
     'roi_head.bbox_head.fc_cls.weight': (81, 4)},
    {'decode_head.conv_seg.weight': (150, 8, 1, 1), 'auxiliary_head.conv_seg.bias': (150,)}, {}])
def test_dense(arch, generation, heads):
    model = random_backbone(arch)
    heads = {k: torch.randn(s) for k, s in heads.items()}
    found = to_mm(dense_state(model, generation) | heads)
    # Heads keep their names and shapes: their own linear or 1x1 weights are none of ours.
    assert_same(found, {f'backbone.{k}': v for k, v in model.state_dict().items()} | heads)
    task = infer_task(found)
    assert task == ('backbone' if not heads else 'seg' if 'decode_head' in str(heads) else 'det')
    assert_same(to_mm(to_official(found)), found)
    assert set(to_official(found)) == set(dense_state(
        model, prefix='backbone.' if heads else '') | heads)


def test_round_trip_is_the_identity(arch):
    model = random_backbone(arch, (3,))
    ours = to_mm(classifier_state(model, 10))
    assert set(to_official(ours)) == set(classifier_state(model, 10))
    assert_same(to_mm(to_official(ours)), ours)
    assert_same(to_mm(ours), ours)


def test_bare_backbone_of_ours(arch):
    state = random_backbone(arch).state_dict()
    assert set(to_mm(state)) == {f'backbone.{k}' for k in state}


def test_several_backbones_keep_their_places():
    state = dense_state(random_backbone(S1), prefix='student.backbone.')
    state |= dense_state(random_backbone(S1), prefix='teacher.backbone.')
    assert {k.split('.')[2] for k in to_mm(state)} == {'patch_embed', 'stages', 'norm0', 'norm1',
                                                       'norm2', 'norm3'}


def test_what_is_no_vmamba():
    for state in ({}, {'layers.0.blocks.0.attn.weight': torch.zeros(1)}):
        assert family_of(state) is None
        with pytest.raises(UserError, match='not those of a VMamba'):
            to_mm(state)
    state = classifier_state(random_backbone(S1, (3,)), 10)
    with pytest.raises(UserError, match='pos_embed'):
        to_mm(state | {'pos_embed.weight': torch.zeros(1)})


# --- what a file holds ----------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(VMamba.arch_settings))
def test_arch_is_told_from_names_and_shapes(name):
    with torch.device('meta'):
        model = VMamba(name)
    assert infer_arch(model.state_dict()) == name
    assert infer_arch(dense_state(model)) == name
    assert infer_arch(dense_state(model, generation=1)) == name


@pytest.mark.parametrize('change', [
    dict(embed_dims=12), dict(depths=(1, 2, 3, 4)), dict(d_state=3), dict(ssm_ratio=1.5),
    dict(dt_rank=5), dict(conv_bias=True), dict(gate=True), dict(mlp_ratio=0.0),
    dict(mlp_ratio=2.0), dict(stem='patch'), dict(downsample='merge'), dict(conv_kernel=0),
    dict(conv_kernel=5), dict(conv_kernel=0, gate=True)])
def test_own_arch_is_told(change):
    arch = dict(S1, **change)
    model = VMamba(arch)
    assert infer_arch(model.state_dict()) == arch
    assert_same(to_mm(dense_state(model)),
                {f'backbone.{k}': v for k, v in model.state_dict().items()})


def test_mix_up_names_the_arch_and_the_config():
    with torch.device('meta'):
        held, model = VMamba('tiny_s2l5', (3,)), VMamba('tiny_s1l8', (3,))
    head = {'head.fc.weight': torch.zeros(1000, 768), 'head.fc.bias': torch.zeros(1000)}
    expected = {f'backbone.{k}': v for k, v in model.state_dict().items()} | head
    found = to_mm(classifier_state(held))
    wrong = differences(expected, found)
    text = explain_differences(wrong, expected, found, 'f.pth')
    for words in ("f.pth does not fit the model: it holds the arch 'tiny_s2l5'", "'tiny_s1l8'",
                  'configs/vmamba/vmamba-tiny-s2l5_8xb128_in1k-224.py',
                  'backbone.stages.0.blocks.0.ssm.x_proj_weight is (4, 8, 192), in the model '
                  '(4, 8, 96)'):
        assert words in text


# --- the nine published models --------------------------------------------------------------

@pytest.fixture(scope='module')
def official_keys():
    path = SHARED / 'facts/official_keys.json'
    if not path.is_file():
        pytest.skip('no ../shared/facts/official_keys.json beside the checkout')
    return json.loads(path.read_text())


@pytest.mark.parametrize('name', sorted(VMamba.arch_settings))
def test_published_keys(name, official_keys):
    expected = {k: tuple(s) for k, s in official_keys[name]['keys'].items()}
    official = {k: torch.empty(s, device='meta') for k, s in expected.items()}
    found = to_mm(official)
    assert infer_arch(official) == name
    with torch.device('meta'):
        model = VMamba(name, (3,))
    ours = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    assert set(differences(ours, found)) == {'head.fc.weight', 'head.fc.bias'}
    assert {k: tuple(v.shape) for k, v in to_official(found).items()} == expected
