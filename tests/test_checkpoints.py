"""Official names to ours and back, whose weights these are, and what is told from them."""

import itertools

import pytest
import torch
from official import SHARED
from specs import SPECS, each, each_arch, each_spec, registered  # noqa: F401 (a fixture)

from vmamba_mm.checkpoints.compare import differences, explain_differences
from vmamba_mm.checkpoints.files import read_checkpoint, select_weights
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import (
    FAMILIES,
    SeveralFamilies,
    family_of,
    register_family,
    unregister_family,
)

WRAPPERS = ('', 'module.', 'model.', 'module.model.')
HEADS = {
    'det': {'neck.convs.0.conv.weight': (4, 8, 1, 1), 'rpn_head.rpn_cls.weight': (3, 4, 1, 1),
            'roi_head.bbox_head.fc_cls.weight': (81, 4)},
    'seg': {'decode_head.conv_seg.weight': (9, 8, 1, 1), 'auxiliary_head.conv_seg.bias': (9,)},
    'backbone': {}}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def last_only(spec, arch, seed=0):
    """A random backbone of a classifier."""
    return spec.random_model(arch, seed, **spec.of_classifiers(arch))


# --- names --------------------------------------------------------------------------------------

@each_arch
def test_classifier(spec, arch):
    model = last_only(spec, arch)
    states = spec.official_classifiers(model, 10)
    for state, wrapper in itertools.product(states, WRAPPERS):
        wrapped = under(wrapper, state)
        wrapped[f'{wrapper}total_ops'] = wrapped['layers.0.total_params'] = torch.zeros(1)
        converted = to_mm(wrapped, **spec.told(arch, wrapped))
        backbone = under('backbone.', model.state_dict())
        assert_same({k: v for k, v in converted.items() if k in backbone}, backbone)
        head = {k: v for k, v in converted.items() if k not in backbone}
        assert set(head) == spec.head_weights(arch)
        assert {v.data_ptr() for v in head.values()} <= {
            v.data_ptr() for v in state.values()}  # not copied
        assert infer_task(converted) == spec.family.task and family_of(converted) is spec.family
        assert_same(to_mm(to_official(converted), **spec.told(arch, state)), converted)
        assert_same(to_mm(converted), converted)
        if state is states[0]:
            names, found = ({k.removeprefix(spec.place_in(keys)) for k in keys}
                            for keys in (state, to_official(converted)))
            assert found <= names


@each_arch
@pytest.mark.parametrize('task', HEADS)
def test_dense(spec, arch, task):
    model = spec.random_model(arch)
    heads = {k: torch.randn(s) for k, s in HEADS[task].items()}
    expected = under('backbone.', model.state_dict()) | heads
    for state in spec.official(model):
        told = spec.told(arch, under('backbone.', state))
        converted = to_mm(under('backbone.', state) | heads, **told)
        # Heads keep their names and shapes: their own linear or 1x1 weights are none of ours.
        assert_same(converted, expected)
        assert infer_task(converted) == task
        assert_same(to_mm(to_official(converted), **told), converted)
    assert_same(to_mm(model.state_dict()), under('backbone.', model.state_dict()))


@each_spec
def test_extra_states_of_modules(spec, tmp_path):
    """What a module's ``get_extra_state`` gives need be no tensor."""
    name = f'{spec.a_weight.rpartition(".")[0]}._extra_state'
    state = under('backbone.', spec.random_model().state_dict() | {name: {'seen': 3}})
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read['meta'] == dict(arch=spec.first, task='backbone')
    assert read['state_dict'][f'backbone.{name}'] == {'seen': 3}
    assert family_of(state) is spec.family and infer_arch(state) == spec.first


@each_spec
def test_several_backbones_keep_their_places(spec):
    model = spec.random_model()
    for state in spec.official(model):
        both = under('student.backbone.', state) | under('teacher.backbone.', state)
        told = spec.told(spec.first, state)
        assert_same(to_mm(both, **told), under('student.backbone.', model.state_dict())
                    | under('teacher.backbone.', model.state_dict()))


@each_arch
def test_arch_is_told_from_names_and_shapes(spec, arch):
    states = [(spec.model(arch).state_dict(), {})]
    states += [(state, spec.told(arch, state)) for state in spec.official(spec.model(arch))]
    for state, family in states:
        told = infer_arch(state, **family)
        plain = {k: v for k, v in arch.items() if not spec.family.rules[k].optional
                 or k in told}
        assert told == plain


@each_spec
def test_published_architectures_are_told(spec):
    for name, first in spec.told_archs().items():
        model = spec.published(name)
        assert infer_arch(model.state_dict()) == first
        for state in spec.official(model):
            assert infer_arch(state, **spec.told(name, state)) == first


@each('changes')
def test_own_architectures_are_told(spec, item):
    arch = dict(spec.first, **item)
    model = spec.model(arch)
    assert infer_arch(model.state_dict()) == arch
    for state in spec.official(model):
        assert_same(to_mm(under('backbone.', state), **spec.told(arch, state)),
                    under('backbone.', model.state_dict()))


@pytest.mark.parametrize('spec', [s for s in SPECS.values() if s.published_keys],
                         ids=lambda spec: spec.family.name)
def test_published_keys(spec):
    """Of the official files, where a list of them is at hand."""
    published = spec.published_keys()
    if published is None:
        pytest.skip('no list of the official keys beside the checkout')
    assert set(published) == set(spec.family.archs)
    firsts = spec.told_archs()
    for name, keys in published.items():
        official = {k: torch.empty(shape, device='meta') for k, shape in keys.items()}
        told = spec.told(name, official)
        assert infer_arch(official, **told) == firsts[name]
        converted = to_mm(official, **told)
        model = spec.published(name, is_classifier=True)
        wrong = differences(under('backbone.', model.state_dict()), converted)
        assert wrong and all(key.startswith(f'{spec.head.partition(".")[0]}.') for key in wrong)
        assert {k: tuple(v.shape) for k, v in to_official(converted).items()} == keys


@each_spec
def test_mix_up_names_the_arch_and_the_config(spec):
    first, *others = dict.fromkeys(spec.told_archs().values())
    held = spec.published(first)
    if others:
        model, is_another = spec.published(others[0]), f'is {others[0]!r}'
    else:
        with torch.device('meta'):
            model = spec.model(dict(base=first, **spec.changes[0]))
        is_another = 'has another'
    expected, found = (under('backbone.', m.state_dict()) for m in (model, held))
    wrong = differences(expected, found)
    head = {f'{spec.head}.weight': torch.zeros(1000, model.num_features[-1])}
    for more, advice in (({}, f'build it with arch={first!r}; backbone.'),
                         (head, f'use configs/{spec.family.system or spec.family.name}/')):
        text = explain_differences(wrong, expected | more, found | more, 'f.pth')
        assert text.startswith(f'f.pth does not fit the model: it holds the arch {first!r}, and '
                               f'the model {is_another}: {advice}')
        assert ' more' in text and all(f'{k} {v}' in text for k, v in list(wrong.items())[:3])


# --- whose weights these are --------------------------------------------------------------------

def official_states(spec, arch):
    """Weights by all official names, alone and inside models."""
    for state in (*spec.official(spec.random_model(arch)),
                  *spec.official_classifiers(last_only(spec, arch), 10)):
        yield state
        yield under('module.backbone.', state) if 'head.weight' not in state else state


@pytest.fixture
def all_registered():
    added = [register_family(spec.family) for spec in SPECS.values()
             if spec.family.name not in FAMILIES]
    yield
    for family in added:
        unregister_family(family)


@each_spec
def test_each_family_knows_its_own_weights_alone(spec, all_registered):
    for arch in spec.archs.values():
        state = spec.random_model(arch).state_dict()
        assert family_of(state) is family_of(under('module.backbone.', state)) is spec.family
        for state in official_states(spec, arch):
            spec.told(arch, state)


def official_names(spec, state):
    """{our name: the state's} of a backbone's weights."""
    names = {v.data_ptr(): k for k, v in state.items()}
    return {k.removeprefix('backbone.'): names[v.data_ptr()]
            for k, v in to_mm(state, family=spec.family).items()}


def said(state):
    """The family of weights; None as well where several say yes."""
    try:
        return family_of(state)
    except UserError:
        return None


@each_spec
def test_any_name_more_or_less_is_no_longer_recognised(spec, tmp_path):
    """And comes back untouched, by every name that the file has."""
    model = last_only(spec, spec.first)
    classifiers = spec.official_classifiers(model, 10)
    for state in (model.state_dict(), *spec.official(model), *classifiers):
        names = official_names(spec, state)
        others = [{k: v for k, v in state.items() if k != names[name]}
                  for name in spec.family.signature]
        place = spec.place_in(state)
        others += [under(before, state | {place + more: torch.ones(1)})
                   for before in ('', 'net.', 'backbone.') for more in (
                       'more.weight', 'layers_up.0.blocks.0.self_attention.A_logs')
                   if place + more not in state]
        for other in others:  # what is left may be all of a smaller family's: ViViM's of Vim
            assert said(other) is not spec.family
    more = f'{spec.place_in(classifiers[0])}layers_up.1.weight'
    for state in (classifiers[0] | {more: torch.ones(1)},
                  under('net.', spec.official(model)[0]) | {'net.more': torch.ones(1)}):
        for content in (dict(state_dict=state, epoch=3), dict(model=state), state):
            torch.save(content, tmp_path / 'a.pth')
            read = read_checkpoint(tmp_path / 'a.pth')
            assert list(read) == list(content)
            assert_same(read.get('state_dict', read.get('model', read)), state)


@each_spec
def test_somebody_elses_module_inside_another_model_is_left_alone(spec, tmp_path):
    """mmengine's loader does not know the model; the authors' own backbone has these names."""
    state = spec.official(spec.random_model())[0]
    for prefix in ('net.', 'backbone.', 'net.backbone.'):
        given = under(prefix, state) | {'decode_head.weight': torch.ones(2)}
        torch.save(dict(state_dict=given, meta={}), tmp_path / 'a.pth')
        assert_same(read_checkpoint(tmp_path / 'a.pth', keep_places=True)['state_dict'], given)
        # Whoever asks for our names gets them.
        asked = read_checkpoint(tmp_path / 'a.pth', **spec.told(spec.first, state))['state_dict']
        assert set(asked) == set(under(prefix, spec.model(spec.first).state_dict())) \
            | {'decode_head.weight'}


def test_two_families_that_say_yes(all_registered):
    """Nobody guesses: the names are those of both."""
    import dataclasses

    spec = SPECS['made_up']
    twin = dataclasses.replace(spec.family, name='twin', model='Twin', configs=None)
    state = spec.model(spec.first).state_dict()
    register_family(twin)
    try:
        for call in (family_of, to_mm, infer_arch):
            with pytest.raises(UserError, match="under '' are named like those of Ripple and of "
                                                'Twin: say which of the families it is'):
                call(state)
        assert_same(to_mm(state, family=twin), under('backbone.', state))
        with pytest.raises(ValueError, match="a family 'ripple' with the model 'Ripple' already"):
            register_family(dataclasses.replace(spec.family, name='other'))
        with pytest.raises(ValueError, match='must be a Python identifier'):
            register_family(dataclasses.replace(spec.family, name='vm-unet', model='U'))
    finally:
        unregister_family(twin)


def test_several_families_at_several_places(all_registered):
    """A distiller's."""
    one, other = SPECS['vmamba'], SPECS['made_up']
    state = under('teacher.', one.official(one.random_model())[0]) \
        | under('student.', other.official(other.random_model())[0])
    assert_same(to_mm(state), under('teacher.', one.random_model().state_dict())
                | under('student.', other.random_model().state_dict()))
    with pytest.raises(UserError, match='several families: .*VMamba under .*teacher'):
        family_of(state)


def test_what_is_no_model_of_ours():
    for state in ({}, {'layers.0.blocks.0.attn.weight': torch.zeros(1)},
                  {'net.blocks.0.mixer.A_logs': torch.zeros(3)}):
        assert family_of(state) is None
        with pytest.raises(UserError, match='not those of a VMamba.*; they are named'):
            to_mm(state)


@each_spec
def test_what_nobody_published_is_named(spec):
    for state in spec.official_classifiers(last_only(spec, spec.first), 10):
        with pytest.raises(UserError, match=f'like those of a {spec.family.model}, but '
                                            'extra.weight is of none that was published'):
            to_mm(state | {f'{spec.place_in(state)}extra.weight': torch.zeros(1)})


#: {file or folder: system} of what is no model of its folder's system: VM-UNet starts from VMamba's
#: weights, and a block, or its operator, alone is no model.
SYSTEMS = {'vm_unet/vmamba_init.pth': 'vmamba', 'mamba2': None,
           'video_mamba_suite/action_mamba_block.pth': None,
           **{f'vmamba_m2/ss2d_{name}.pth': None for name in ('m0', 'm0_noz', 'm0_onnone_noz')}}


def shared_files():
    folder = SHARED / 'parity'
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.pth'))


@pytest.mark.skipif(not shared_files(), reason='no ../shared/parity beside the checkout')
def test_files_of_other_systems_are_not_mistaken():
    """Among them some with the very names of SS2D: VM-UNet, MambaIR, RS-Mamba."""
    for name in shared_files():
        path = SHARED / 'parity' / name
        content = read_content(path)
        try:
            read = select_weights(content, 'auto', path, keep_places=True)
        except SeveralFamilies as err:  # nobody guesses
            assert name.partition('/')[0] in {family.name for family in err.families}, name
            continue
        # The files at the root are VMamba's, the others those of the system of the folder.
        folder = name.partition('/')[0] if '/' in name else 'vmamba'
        system = SYSTEMS.get(name, SYSTEMS.get(folder, folder))
        families = [f for f in FAMILIES.values()
                    if system in (f.system or f.name, *f.parity_folders)]
        if families:
            assert family_of(read['state_dict']) in families, name
            continue
        assert read is content, name
        for state in (content, *content.values()):
            if isinstance(state, dict) and any(torch.is_tensor(v) for v in state.values()):
                assert family_of({k: v for k, v in state.items() if torch.is_tensor(v)}) is None
