"""Weights into backbones of every family: all of them or an error, by every way mmengine knows."""

import re

import pytest
import torch
from mmengine.model import BaseModule, PretrainedInit
from official import save_training_file
from specs import each_arch, each_image_arch, each_spec, registered  # noqa: F401 (a fixture)
from torch import nn

from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError

OUTPUT_NORM = re.compile(r'(?:norm\d+|pool_norm)\.')


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def assert_loaded(model, source):
    """Everything that the two have in common."""
    held = model.state_dict()
    assert all(torch.equal(held[k], v) for k, v in source.state_dict().items() if k in held)


def saved(path, state):
    torch.save(dict(meta={}, state_dict=state), path)
    return str(path)


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def last_only(spec, seed=0):
    return spec.random_model(seed=seed, **spec.of_classifiers(spec.first))


def every_output(spec, arch=None, **kwargs):
    arch = arch or spec.first
    return spec.model(arch, spec.stages(arch), **kwargs)


@pytest.fixture
def official_file(spec, tmp_path):
    """An official classification file and the backbone in it."""
    source = last_only(spec)
    state = spec.official_classifiers(source, 10)[0]
    return str(save_training_file(tmp_path / 'official.pth', state)), source


class Around(BaseModule):
    """A detector, so to speak."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def extended(spec):
    """A user's subclass: a module, one with a name as of official files, a buffer in a block."""

    class Extended(spec.model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.adapter = nn.Linear(8, 8)
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            block = self.get_submodule(spec.a_weight.rpartition('.')[0])
            block.register_buffer('scale', torch.ones(3))

    return Extended, ('adapter.weight', 'adapter.bias', 'layers.0.weight', 'layers.0.bias',
                      spec.a_weight.removesuffix('weight') + 'scale')


# --- init_cfg -----------------------------------------------------------------------------------

@each_spec
@pytest.mark.parametrize('prefix', [None, 'backbone.', 'backbone'])
def test_init_cfg_from_a_classifier(spec, prefix, official_file):
    path, source = official_file
    cfg = dict(type='Pretrained', checkpoint=path, **(dict(prefix=prefix) if prefix else {}))
    model, expected = every_output(spec, init_cfg=cfg), source.state_dict()
    before = snapshot(model)
    model.init_weights()
    norms = {key for key in before if OUTPUT_NORM.match(key)}
    for key, value in model.state_dict().items():
        # New for the task, the last one too, as published; but not where it is the only one.
        if key in norms and not norms <= set(expected):
            assert torch.equal(value, before[key])
        else:
            assert torch.equal(value, expected[key]), key


@each_spec
def test_init_cfg_by_other_names_and_beside_others(spec, official_file):
    path, source = official_file
    for kind in ('mmengine.Pretrained', 'mmengine.model.PretrainedInit',
                 'mmengine.model.weight_init.PretrainedInit', PretrainedInit):
        for more in ([], [dict(type='Constant', layer='Linear', val=7.)]):
            model = spec.model(spec.first, **spec.of_classifiers(spec.first),
                               init_cfg=[*more, dict(type=kind, checkpoint=path)])
            model.init_weights()
            assert_unchanged(model, source.state_dict())


@each_arch
def test_init_cfg_of_other_formats(spec, arch, tmp_path):
    from safetensors.torch import save_file

    source = spec.random_model(arch, out_indices=spec.stages(arch))
    ours = under('backbone.', source.state_dict()) | {'rpn_head.rpn_cls.bias': torch.zeros(3)}
    files = [saved(tmp_path / f'{i}.pth', under('backbone.', state))
             for i, state in enumerate(spec.official(source))]
    files += [saved(tmp_path / 'ours.pth', ours), str(tmp_path / 'bare.pth'),
              str(tmp_path / 'a.safetensors')]
    torch.save(source.state_dict(), tmp_path / 'bare.pth')
    save_file({k: v.contiguous() for k, v in ours.items()}, tmp_path / 'a.safetensors')
    for path in (*files, f'file://{files[0]}'):
        model = every_output(spec, arch, init_cfg=dict(type='Pretrained', checkpoint=path))
        model.init_weights()
        assert_unchanged(model, source.state_dict())
    fewer = spec.model(arch, (1,), init_cfg=dict(type='Pretrained', checkpoint=files[0]))
    fewer.init_weights()
    assert_loaded(fewer, source)


@each_spec
def test_init_cfg_inside_a_detector(spec, mm, official_file):
    """mmengine's init_weights of the whole model, with its record of what was set by whom."""
    path, source = official_file
    cfg = dict(type='Pretrained', checkpoint=path)
    model, recorded = Around(spec.model(spec.first, init_cfg=cfg)), {}
    model._dump_init_info = lambda: recorded.update(
        {n: model._params_init_info[p]['init_info'] for n, p in model.named_parameters()})
    model.init_weights()
    assert torch.equal(model.backbone.get_parameter(spec.a_weight),
                       source.get_parameter(spec.a_weight))
    assert path in recorded[f'backbone.{spec.a_weight}']


@each_spec
def test_weights_of_init_cfg(spec, tmp_path):
    first, second = (last_only(spec, seed) for seed in (0, 1))
    path = str(save_training_file(tmp_path / 'a.pth', *(
        spec.official_classifiers(model, 10)[0] for model in (first, second))))
    for weights, source in (('auto', second), ('model', first), ('model_ema', second)):
        model = spec.model(spec.first)
        model.load_pretrained(path, weights=weights)
        assert torch.equal(model.get_parameter(spec.a_weight), source.get_parameter(spec.a_weight))


@each_spec
def test_keys_of_init_cfg(spec, official_file):
    path, _ = official_file
    model = spec.model(spec.first, init_cfg=dict(type='Pretrained', checkpoint=path, strikt=True))
    with pytest.raises(TypeError, match=f"of {spec.family.model} has no key 'strikt'; its keys are "
                                        'checkpoint, prefix, weights, map_location, '
                                        'adapt_in_channels, strict, allow'):
        model.init_weights()
    with pytest.raises(TypeError, match="needs the key 'checkpoint'; its keys are checkpoint"):
        spec.model(spec.first, init_cfg=dict(type='Pretrained')).init_weights()


# --- refusals -----------------------------------------------------------------------------------

@each_spec
def test_anything_else_than_all_of_it_is_refused(spec, tmp_path):
    name, last = spec.a_weight, spec.stages(spec.first)[-1]
    source = last_only(spec)
    beside = name.removesuffix('weight') + 'extra'
    block = f'{spec.model.stages_name}.{last}.'
    cases = [
        (lambda s: s.pop(name), f'{name} is missing'),
        (lambda s: s.update({beside: torch.zeros(3)}),
         rf'{beside} is not in the model \(the file has \(3,\)\)'),
        (lambda s: s.update({name: torch.zeros(31)}), rf'{name} is \(31,\), in the model \('),
        (lambda s: s.update({'extra.table': torch.zeros(3)}), 'extra.table is not in the model'),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith(block)], 'it holds the arch')]
    for change, message in cases:
        state = dict(source.state_dict())
        change(state)
        path = saved(tmp_path / 'a.pth', under('backbone.', state))
        model = spec.model(spec.first, source.out_indices,
                           init_cfg=dict(type='Pretrained', checkpoint=path))
        before = snapshot(model)
        with pytest.raises(UserError, match=rf'a\.pth does not fit the model: .*{message}'):
            model.init_weights()
        with pytest.raises(UserError, match=f'the state dict does not fit the model: .*{message}'):
            model.load_state_dict(state)
        assert_unchanged(model, before)


@each_spec
def test_an_official_file_is_all_there_or_refused(spec, tmp_path):
    for state in spec.official_classifiers(last_only(spec), 10):
        names = {v.data_ptr(): k for k, v in state.items()}
        renamed = to_mm(state, family=spec.family)
        key = names[renamed[f'backbone.{spec.a_weight}'].data_ptr()]
        path = str(save_training_file(tmp_path / 'a.pth', {k: v for k, v in state.items()
                                                           if k != key}))
        with pytest.raises(UserError, match=rf'a\.pth does not fit.*{spec.a_weight} is missing'):
            spec.model(spec.first).load_pretrained(path)
        path = str(save_training_file(tmp_path / 'b.pth', state | {
                f'{spec.place_in(state)}more.x': torch.ones(1)}))
        with pytest.raises(UserError, match='but more.x is of none that was published'):
            spec.model(spec.first).load_pretrained(path)


@each_spec
def test_another_architecture_is_refused_all_the_same(spec, tmp_path):
    other = dict(spec.first, **spec.changes[0])
    for held, wanted in ((other, spec.first), (spec.first, other)):
        path = saved(tmp_path / 'a.pth', spec.model(held).state_dict())
        model = spec.model(wanted)
        before = snapshot(model)
        for kwargs, message in (({}, 'a.pth does not fit the model: it holds the arch '), (
                dict(strict=False, allow=['.*']),
                'holds the arch .* neither strict nor allow excuses another architecture')):
            with pytest.raises(UserError, match=message):
                model.load_pretrained(path, **kwargs)
        assert_unchanged(model, before)


@each_spec
def test_places(spec, official_file, tmp_path):
    path, source = official_file
    with pytest.raises(UserError, match="begin with 'model.', only with: backbone, "
                                        + spec.head.partition('.')[0]):
        spec.model(spec.first).load_pretrained(path, prefix='model.')
    state, name = source.state_dict(), spec.family.model
    both = saved(tmp_path / 'b.pth', under('student.', state) | under('teacher.backbone.', state))
    with pytest.raises(UserError, match=rf"b.pth holds a {name} under 'student.' and a {name} "
                                        r"under 'teacher.backbone.': say with prefix="):
        spec.model(spec.first).load_pretrained(both)
    alone = saved(tmp_path / 'c.pth', under('net.', state) | {'fc.weight': torch.ones(2, 2)})
    for file, prefix in ((both, 'student'), (both, 'teacher.backbone.'), (alone, None)):
        model = spec.model(spec.first, **spec.of_classifiers(spec.first))
        model.load_pretrained(file, prefix=prefix)
        assert_unchanged(model, state)


# --- state dicts --------------------------------------------------------------------------------

@each_arch
def test_official_names_by_torch_alone(spec, arch):
    """Read by somebody else's tool: the names are told by the model itself."""
    source = spec.random_model(arch)
    for state in spec.official(source):
        whole = Around(spec.model(arch))
        whole.load_state_dict(under('backbone.', state) | under('head.', whole.head.state_dict()))
        alone = spec.model(arch)
        alone.load_state_dict(state)
        for model in (whole.backbone, alone):
            assert_unchanged(model, source.state_dict())
    with pytest.raises(UserError, match='is missing'):
        alone.load_state_dict({}, strict=False)


@each_spec
def test_whole_model_loads_official_names_or_raises(spec, mm, tmp_path):
    """By mmengine's load_checkpoint, which never is strict."""
    from mmengine.runner import load_checkpoint, load_state_dict

    source = Around(spec.random_model())
    head = under('head.', source.head.state_dict())
    for state in (source.backbone.state_dict(), *spec.official(source.backbone)):
        model = Around(spec.model(spec.first))
        load_checkpoint(model, saved(tmp_path / 'a.pth', under('backbone.', state) | head))
        assert_unchanged(model, source.state_dict())
    whole = source.state_dict()
    part = {k: v for k, v in whole.items() if spec.a_weight not in k}
    other = Around(spec.model(dict(spec.first, **spec.changes[0]))).state_dict()
    kind, _ = extended(spec)
    for make, given in ((spec.model, part), (kind, part), (spec.model, {}), (spec.model, other)):
        model = Around(make(spec.first))
        before = snapshot(model)
        for load in (load_state_dict, lambda m, state: load_checkpoint(
                m, saved(tmp_path / 'b.pth', state | {'head.bias': torch.ones(2)}))):
            with pytest.raises(UserError, match='the state dict does not fit the model'):
                load(model, dict(given))
        assert_unchanged(model, before)


@each_spec
def test_a_deliberate_part_by_torch(spec):
    source, model = spec.random_model(), spec.model(spec.first)
    part = {spec.a_weight: source.get_parameter(spec.a_weight).detach()}
    before = snapshot(model)
    result = model.load_state_dict(part | {'new': torch.ones(1)}, strict=False)
    counters = {k for k in before if k.endswith('.num_batches_tracked')}  # torch starts them itself
    assert set(result.missing_keys) == set(before) - set(part) - counters
    assert result.unexpected_keys == ['new']
    assert_unchanged(model, before | part)
    # In a model around it; a part may have nothing of the backbone.
    whole = Around(spec.model(spec.first))
    for given in (under('backbone.', part), {'head.bias': torch.ones(2)}):
        assert not whole.load_state_dict(given, strict=False).unexpected_keys
        with pytest.raises(UserError, match='is missing'):
            whole.load_state_dict(given)
    assert torch.equal(whole.backbone.get_parameter(spec.a_weight), part[spec.a_weight])
    with pytest.raises(RuntimeError, match='size mismatch'):
        model.load_state_dict({spec.a_weight: torch.ones(9)}, strict=False)
    for nothing in ({}, under('backbone.', part)):
        with pytest.raises(UserError, match='is missing'):  # a prefix too many, not a part
            model.load_state_dict(nothing, strict=False)


# --- what a user added --------------------------------------------------------------------------

@each_spec
def test_subclasses_load_what_is_published(spec, mm, tmp_path):
    from mmengine.runner import load_checkpoint

    kind, added = extended(spec)
    source = spec.random_model()
    states = spec.official(source)
    path = saved(tmp_path / 'a.pth', under('backbone.', states[0]))
    for strict in ({}, dict(strict=False)):
        model = kind(spec.first, init_cfg=dict(type='Pretrained', checkpoint=path, **strict))
        model.adapter.weight.data.fill_(7)
        model.init_weights()
        assert_loaded(model, source)
        assert (model.adapter.weight == 7).all()
    with pytest.raises(UserError, match='adapter.weight is missing'):
        kind(spec.first).load_pretrained(path, strict=True)
    for state in (source.state_dict(), *states):
        model = kind(spec.first)
        assert set(model.load_state_dict(state, strict=False).missing_keys) == set(added)
        assert_loaded(model, source)
        with pytest.raises(UserError, match='adapter.weight is missing'):
            kind(spec.first).load_state_dict(state)
    # Its own files, into it and into a plain model.
    own = kind(spec.first)
    path = saved(tmp_path / 'b.pth', own.state_dict())
    whole = saved(tmp_path / 'c.pth', Around(own).state_dict())
    model = kind(spec.first)
    model.load_pretrained(path, strict=True)
    assert_loaded(model, own)
    for around in (Around(kind(spec.first)), Around(spec.model(spec.first))):
        load_checkpoint(around, whole)
        assert_loaded(around.backbone, own)
    plain = spec.model(spec.first)
    with pytest.raises(UserError, match='adapter.weight is not in the model'):
        plain.load_pretrained(path)
    plain.load_pretrained(path, strict=False)
    assert_loaded(plain, own)
    assert set(plain.load_state_dict(own.state_dict(), strict=False).unexpected_keys) == set(added)


@each_spec
def test_allowed_differences(spec, tmp_path):
    source = spec.random_model()
    beside = spec.a_weight.removesuffix('weight') + 'extra'
    state = dict(source.state_dict()) | {beside: torch.zeros(2)}
    missing, *_, other = [k for k in state if k.startswith(spec.model.stages_name)
                          and k.endswith('.weight') and k != spec.a_weight]
    del state[missing]
    state[other] = torch.zeros(5, 5)
    path = saved(tmp_path / 'a.pth', under('backbone.', state))
    excused = [f'^{re.escape(missing)}$', r'^backbone\..*extra$', other]
    for left in range(3):
        message = [f'{missing} is missing', 'extra is not in the model',
                   rf'{other} is \(5, 5\), in the model'][left]
        with pytest.raises(UserError, match=message):
            spec.model(spec.first).load_pretrained(path, allow=excused[:left] + excused[left + 1:])
    model = spec.model(spec.first)
    before = snapshot(model)
    model.load_pretrained(path, allow=excused)
    for key, value in model.state_dict().items():
        held = key in state and state[key].shape == value.shape
        assert torch.equal(value, state[key] if held else before[key]), key
    path = saved(tmp_path / 'b.pth', {k: v for k, v in source.state_dict().items()
                                      if k != spec.a_weight})
    spec.model(spec.first).load_pretrained(path, allow=f'{spec.a_weight}$')  # one pattern
    with pytest.raises(UserError, match=f'{spec.a_weight} is missing'):
        spec.model(spec.first).load_pretrained(path, strict=False)
    with pytest.raises(UserError, match=r"allow: '\[' is no regular expression"):
        spec.model(spec.first).load_pretrained(path, allow=['['])


# --- other channels -----------------------------------------------------------------------------

@each_image_arch
def test_stem_of_other_channels(spec, arch, tmp_path):
    source = spec.random_model(arch)
    path = saved(tmp_path / 'a.pth', source.state_dict())
    key = next(k for k in spec.family.first_convs if k in source.state_dict())
    x = spec.input(arch, 1, 1, 40, 33)
    expected, weight = source(x.repeat_interleave(3, 1)), source.get_parameter(key)
    for channels in (1, 2, 3, 4, 6, 7):
        cfg = dict(type='Pretrained', checkpoint=path, adapt_in_channels=True)
        model = spec.model(arch, in_channels=channels, init_cfg=cfg).eval()
        model.init_weights()
        for i in range(channels if channels > 1 else 0):
            torch.testing.assert_close(model.get_parameter(key)[:, i],
                                       weight[:, i % 3] * 3 / channels)
        if channels in (1, 3, 6):  # whole rounds: equal channels give what they gave
            for out, want in zip(model(x.repeat_interleave(channels, 1)), expected, strict=True):
                torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
    model = spec.model(arch, in_channels=6)
    before = snapshot(model)
    with pytest.raises(UserError, match='adapt_in_channels=True.* from 3 to 6 channels'):
        model.load_pretrained(path)
    with pytest.raises(UserError, match='adapt_in_channels=True'):
        model.load_state_dict(source.state_dict())
    assert_unchanged(model, before)
    path = saved(tmp_path / 'b.pth', model.state_dict())
    spec.model(arch, in_channels=1).load_pretrained(path, adapt_in_channels=True)
    with pytest.raises(UserError, match='b.pth: a stem of 6 channels cannot be adapted to 4'):
        spec.model(arch, in_channels=4).load_pretrained(path, adapt_in_channels=True)
