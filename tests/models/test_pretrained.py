"""Weights into models: all of them or an error, by every way that mmengine knows."""

import pytest
import torch
from mmengine.model import PretrainedInit
from official import (
    S1,
    S2,
    VANILLA,
    classifier_state,
    dense_state,
    random_backbone,
    save_training_file,
)
from torch import nn

from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError
from vmamba_mm.models import VMamba


@pytest.fixture
def official_file(tmp_path):
    """An official classification file and the backbone in it."""
    source = random_backbone(S1, (3,))
    path = save_training_file(tmp_path / 'a.pth', classifier_state(source, 10))
    return str(path), source


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def init(arch, path, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=path, **kwargs)
    model = VMamba(arch, init_cfg=init_cfg)
    model.init_weights()
    return model


# --- init_cfg -------------------------------------------------------------------------------

@pytest.mark.parametrize('prefix', [None, 'backbone.', 'backbone'])
def test_init_cfg_from_a_classifier(prefix, official_file):
    path, source = official_file
    model = init(S1, path, prefix=prefix) if prefix else init(S1, path)
    expected = source.state_dict()
    for key, value in model.state_dict().items():
        if key.startswith('norm'):  # new for the task, the last one too, as published
            assert torch.equal(value, torch.full_like(value, float(key.endswith('weight'))))
        else:
            assert torch.equal(value, expected[key]), key


def test_init_cfg_takes_the_norm_of_the_same_output(official_file):
    path, source = official_file
    model = VMamba(S1, (3,), init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert_unchanged(model, source.state_dict())


@pytest.mark.parametrize('kind', [
    'mmengine.Pretrained', 'mmengine.model.PretrainedInit',
    'mmengine.model.weight_init.PretrainedInit', PretrainedInit], ids=str)
def test_init_cfg_by_other_names(kind, official_file):
    path, source = official_file
    model = VMamba(S1, (3,), init_cfg=dict(type=kind, checkpoint=path))
    model.init_weights()
    assert_unchanged(model, source.state_dict())


def test_init_cfg_of_other_formats(tmp_path):
    from safetensors.torch import save_file

    source = random_backbone(VANILLA)
    dense = dense_state(source, generation=1) | {'rpn_head.rpn_cls.bias': torch.zeros(3)}
    ours = to_mm(dense)
    torch.save(dict(meta={}, state_dict=dense), tmp_path / 'dense.pth')
    torch.save(dict(meta={}, state_dict=ours), tmp_path / 'ours.pth')
    torch.save(source.state_dict(), tmp_path / 'bare.pth')
    save_file({k: v.contiguous() for k, v in ours.items()}, tmp_path / 'a.safetensors')
    for name in ('dense.pth', 'ours.pth', 'bare.pth', 'a.safetensors'):
        for address in (tmp_path / name, f'file://{tmp_path / name}'):
            assert_unchanged(init(VANILLA, str(address)), source.state_dict())
    # Fewer outputs than the file has.
    model = VMamba(VANILLA, (1, 2), init_cfg=dict(type='Pretrained',
                                                  checkpoint=str(tmp_path / 'dense.pth')))
    model.init_weights()
    assert torch.equal(model.norm1.weight, source.norm1.weight)


def test_init_cfg_inside_a_detector(mm, official_file, tmp_path):
    """mmengine's init_weights of the whole model, with its record of what was set by whom."""
    from mmengine.model import BaseModule

    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = VMamba(S1, init_cfg=dict(type='Pretrained',
                                                     checkpoint=official_file[0]))
            self.neck = nn.Conv2d(8, 8, 1)

    model = Detector()
    recorded = {}
    model._dump_init_info = lambda: recorded.update(
        {n: model._params_init_info[p]['init_info'] for n, p in model.named_parameters()})
    model.init_weights()
    weight = 'stages.0.blocks.0.ssm.in_proj.weight'
    assert torch.equal(model.backbone.get_parameter(weight),
                       official_file[1].get_parameter(weight))
    assert official_file[0] in recorded[f'backbone.{weight}']


def test_init_cfg_list_with_other_initialisers(official_file):
    path, source = official_file
    model = VMamba(S1, (3,), init_cfg=[dict(type='Constant', layer='Linear', val=7.),
                                       dict(type='Pretrained', checkpoint=path)])
    model.init_weights()
    assert_unchanged(model, source.state_dict())


def test_weights_of_init_cfg(tmp_path):
    first, second = (classifier_state(random_backbone(S1, (3,), seed=i), 10) for i in (0, 1))
    path = str(save_training_file(tmp_path / 'a.pth', first, second))
    key = 'stages.0.blocks.0.ssm.A_logs'
    official = 'layers.0.blocks.0.op.A_logs'
    assert torch.equal(init(S1, path).get_parameter(key), second[official])
    assert torch.equal(init(S1, path, weights='model').get_parameter(key), first[official])


# --- refusals -------------------------------------------------------------------------------

@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('layers.2.blocks.1.mlp.fc1.weight'),
     'stages.2.blocks.1.mlp.fc1.weight is missing'),
    (lambda s: s.update({'layers.0.blocks.0.op.extra': torch.zeros(3)}),
     r'ssm.extra is not in the model \(the file has \(3,\)\)'),
    (lambda s: s.update({'layers.0.blocks.0.op.Ds': torch.zeros(31)}),
     r'ssm.Ds is \(31,\), in the model \(32,\)'),
    (lambda s: s.update({'relative_position_bias.table': torch.zeros(3)}), 'relative_position'),
    (lambda s: [s.pop(k) for k in list(s) if 'layers.3' in k], r'depths.*\(1, 1, 2, 0\)')])
def test_anything_else_than_all_of_it_is_refused(change, message, tmp_path):
    state = classifier_state(random_backbone(S1, (3,)), 10)
    change(state)
    path = str(save_training_file(tmp_path / 'a.pth', state))
    model = VMamba(S1, init_cfg=dict(type='Pretrained', checkpoint=path))
    before = snapshot(model)
    with pytest.raises(UserError, match=message):
        model.init_weights()
    assert_unchanged(model, before)


@pytest.mark.parametrize('held, wanted', [(S2, S1), (S1, VANILLA), (VANILLA, S2)])
def test_another_variant_is_refused(held, wanted, tmp_path):
    path = str(save_training_file(tmp_path / 'a.pth', classifier_state(random_backbone(held, (3,)),
                                                                       10)))
    model = VMamba(wanted, init_cfg=dict(type='Pretrained', checkpoint=path))
    before = snapshot(model)
    with pytest.raises(UserError, match=f"a.pth does not fit.*'ssm_ratio': {held['ssm_ratio']}"):
        model.init_weights()
    assert_unchanged(model, before)


def test_prefix_that_the_file_does_not_have(official_file):
    with pytest.raises(UserError, match="begin with 'model.', only with: backbone, head"):
        init(S1, official_file[0], prefix='model.')


@pytest.mark.parametrize('out_indices, task', [((3,), 'cls'), ((0, 1, 2, 3), 'det')])
def test_whole_model_loads_official_names_or_raises(mm, out_indices, task, tmp_path):
    """By mmengine's load_checkpoint, which never is strict."""
    from mmengine.runner import load_checkpoint

    class Whole(nn.Module):
        def __init__(self, arch):
            super().__init__()
            self.backbone = VMamba(arch, out_indices=out_indices)
            if task == 'cls':
                self.head = nn.Module()
                self.head.fc = nn.Linear(64, 10)
            else:
                self.neck = nn.Conv2d(8, 8, 1)

    source = random_backbone(S1, out_indices)
    path = tmp_path / 'a.pth'
    if task == 'cls':
        state = classifier_state(source, 10)
        save_training_file(path, state)
    else:
        state = dense_state(source) | {'neck.weight': torch.randn(8, 8, 1, 1),
                                       'neck.bias': torch.randn(8)}
        torch.save(dict(meta={}, state_dict=state), path)
    model = Whole(S1)
    load_checkpoint(model, str(path))
    expected = to_mm(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    other = Whole(S2)
    before = snapshot(other)
    with pytest.raises(UserError, match='does not fit the model'):
        load_checkpoint(other, str(path))
    assert_unchanged(other, before)


def test_classifier_into_a_detector_is_refused(mm, official_file):
    """mmengine would log the norms and heads that stay random, and go on."""
    from mmengine.runner import load_checkpoint

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = VMamba(S1)

    with pytest.raises(UserError, match='norm0.weight is missing'):
        load_checkpoint(Detector(), official_file[0])


def test_official_names_by_torch_alone():
    """Read by somebody else's tool: the names are told by the model itself."""
    source = random_backbone(VANILLA)
    whole = nn.Module()
    whole.backbone = VMamba(VANILLA)
    whole.load_state_dict(dense_state(source, generation=1))
    assert_unchanged(whole.backbone, source.state_dict())
    alone = VMamba(VANILLA)
    alone.load_state_dict(dense_state(source, prefix=''))
    assert_unchanged(alone, source.state_dict())
    with pytest.raises(UserError, match='is missing'):
        alone.load_state_dict({}, strict=False)
    assert alone.load_state_dict({'norm0.bias': torch.ones(8)}, strict=False).missing_keys


# --- what a user added, and parts ---------------------------------------------------------------

class Extended(VMamba):
    """A user's subclass: a module, one with a name as of official files, a buffer in a block."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapter = nn.Linear(8, 8)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.stages[0].blocks[0].register_buffer('scale', torch.ones(3))


ADDED = ('adapter.weight', 'adapter.bias', 'layers.0.weight', 'layers.0.bias',
         'stages.0.blocks.0.scale')


class Around(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def saved(path, state):
    torch.save(dict(meta={}, state_dict=state), path)
    return str(path)


def assert_loaded(model, source):
    """Everything that the two have in common."""
    found = model.state_dict()
    assert all(torch.equal(found[k], v) for k, v in source.state_dict().items() if k in found)


def test_subclass_loads_what_is_published(tmp_path):
    source = random_backbone(S1)
    path = saved(tmp_path / 'a.pth', dense_state(source))
    for strict in ({}, dict(strict=False)):
        model = Extended(S1, init_cfg=dict(type='Pretrained', checkpoint=path, **strict))
        model.adapter.weight.data.fill_(7)
        model.init_weights()
        assert_loaded(model, source)
        assert (model.adapter.weight == 7).all() and (model.stages[0].blocks[0].scale == 1).all()
    model = Extended(S1)
    with pytest.raises(UserError, match='scale is missing.*adapter.weight is missing'):
        model.load_pretrained(path, strict=True)
    for official in (False, True):
        state = dense_state(source, prefix='') if official else source.state_dict()
        model = Extended(S1)
        assert set(model.load_state_dict(state, strict=False).missing_keys) == set(ADDED)
        assert_loaded(model, source)
        with pytest.raises(UserError, match='adapter.weight is missing'):
            Extended(S1).load_state_dict(state)
    # Its own files, into it and into a plain VMamba.
    extended = Extended(S1)
    path = saved(tmp_path / 'b.pth', extended.state_dict())
    for kind in (Extended, Around):
        model = Extended(S1) if kind is Extended else Around(Extended(S1))
        whole = extended if kind is Extended else Around(extended)
        model.load_state_dict(whole.state_dict())
        assert_loaded(model, whole)
    model = Extended(S1)
    model.load_pretrained(path, strict=True)
    assert_loaded(model, extended)
    plain = VMamba(S1)
    with pytest.raises(UserError, match='adapter.weight is not in the model'):
        plain.load_pretrained(path)
    plain.load_pretrained(path, strict=False)
    assert_loaded(plain, extended)
    assert set(plain.load_state_dict(extended.state_dict(), strict=False).unexpected_keys) == set(
        ADDED)


def test_mmengine_wants_what_is_ours_whole(mm, tmp_path):
    """Its strict=False excuses a user's own, and nothing that a VMamba has."""
    from mmengine.runner import load_checkpoint, load_state_dict

    source = Around(random_backbone(S1))
    state = source.state_dict()
    for model, whole in ((Around(Extended(S1)), source), (Around(VMamba(S1)),
                                                          Around(Extended(S1)))):
        load_checkpoint(model, saved(tmp_path / 'a.pth', whole.state_dict()))
        assert_loaded(model, whole)
    part = {k: v for k, v in state.items() if 'stages.2' not in k}
    deeper = Around(VMamba(dict(S1, depths=(1, 1, 3, 1))))
    for model, given in ((Around(Extended(S1)), part), (Around(VMamba(S1)), {}), (deeper, state),
                         (Around(VMamba(S1)), deeper.state_dict())):
        before = snapshot(model)
        with pytest.raises(UserError, match='the state dict does not fit the model'):
            load_state_dict(model, dict(given))
        with pytest.raises(UserError, match='the state dict does not fit the model'):
            load_checkpoint(model, saved(tmp_path / 'b.pth', given | {'head.bias': torch.ones(2)}))
        assert_unchanged(model, before)


def test_adapters_of_mmpretrain(mm):
    """Their state dict is the adapters alone, which mmengine may load."""
    from mmengine.runner import load_state_dict
    from mmpretrain.models.peft import LoRAModel

    def make():
        return Around(LoRAModel(dict(type='vmamba_mm.VMamba', arch=S1), alpha=4, rank=2,
                                targets=[dict(type='in_proj')]))

    source, model = make(), make()
    state = {k: torch.ones_like(v) for k, v in source.state_dict().items() if 'lora' in k}
    load_state_dict(model, dict(state))
    assert (model.backbone.module.stages[3].blocks[0].ssm.in_proj.lora_down.weight == 1).all()
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    # The weight of a layer that was replaced has no place, which is not passed over.
    plain = {f'backbone.module.{k}': v for k, v in random_backbone(S1).state_dict().items()}
    with pytest.raises(UserError, match='in_proj.weight is not in the model'):
        load_state_dict(model, plain)


def test_deliberate_part_by_torch():
    source = random_backbone(S1)
    part = {k: v for k, v in source.state_dict().items() if k.startswith('stages.1.')}
    model = VMamba(S1)
    before = snapshot(model)
    result = model.load_state_dict(part | {'new': torch.ones(1)}, strict=False)
    assert set(result.missing_keys) == set(before) - set(part)
    assert result.unexpected_keys == ['new']
    for key, value in model.state_dict().items():
        assert torch.equal(value, part.get(key, before[key])), key
    # In a model around it; a part may have nothing of the backbone.
    whole = Around(VMamba(S1))
    for given in ({f'backbone.{k}': v for k, v in part.items()}, {'head.bias': torch.ones(2)}):
        assert not whole.load_state_dict(given, strict=False).unexpected_keys
        with pytest.raises(UserError, match='is missing'):
            whole.load_state_dict(given)
    assert torch.equal(whole.backbone.stages[1].blocks[0].ssm.Ds, part['stages.1.blocks.0.ssm.Ds'])
    assert (whole.head.bias == 1).all()
    with pytest.raises(RuntimeError, match='size mismatch'):
        model.load_state_dict({'norm0.bias': torch.ones(9)}, strict=False)
    for nothing in ({}, {f'backbone.{k}': v for k, v in part.items()}):
        with pytest.raises(UserError, match='is missing'):  # a prefix too many, not a part
            model.load_state_dict(nothing, strict=False)


def test_hooks_of_others_rename_first():
    """An adapter may put the weights of the layer that it replaced where it wants them."""
    source = random_backbone(S1)
    model = VMamba(S1)
    block = model.stages[0].blocks[0]
    block.norm1 = nn.Sequential(block.norm1)

    def rename(module, state, prefix, *args):
        for leaf in ('weight', 'bias'):
            old = f'{prefix}stages.0.blocks.0.norm1.{leaf}'
            if old in state:
                state[f'{prefix}stages.0.blocks.0.norm1.0.{leaf}'] = state.pop(old)

    with pytest.raises(UserError, match='norm1.weight is not in the model'):
        model.load_state_dict(source.state_dict())
    model.register_load_state_dict_pre_hook(rename)
    model.load_state_dict(source.state_dict())
    assert torch.equal(block.norm1[0].weight, source.stages[0].blocks[0].norm1.weight)
    whole = Around(model)
    whole.load_state_dict(Around(source).state_dict() | {'head.bias': torch.ones(2)})
    assert len(model._load_state_dict_pre_hooks) == 1


def test_replaced_and_wrapped_submodules(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.nn.utils import prune

    source = random_backbone(S1)
    path = saved(tmp_path / 'a.pth', source.state_dict())

    def change(name):
        model = VMamba(S1)
        block = model.stages[0].blocks[0]
        if name == 'identity':
            block.norm1 = nn.Identity()
        elif name == 'parametrized':
            nn.utils.parametrizations.weight_norm(block.ssm.in_proj)
        elif name == 'pruned':
            prune.l1_unstructured(block.mlp.fc1, 'weight', amount=0.5)
        elif name == 'compiled':
            model.stages[0] = torch.compile(model.stages[0])
        elif name == 'checkpointed':
            model.stages[0].blocks[0] = checkpoint_wrapper(block)
        return model

    for name in ('identity', 'parametrized', 'pruned'):
        model = change(name)
        model.load_state_dict(change(name).state_dict())
        with pytest.raises(UserError, match='is not in the model'):
            model.load_pretrained(path)
        model.load_pretrained(path, strict=False)
        assert_loaded(model, source)
    for name in ('compiled', 'checkpointed'):
        for load in (lambda m: m.load_pretrained(path, strict=True),
                     lambda m: m.load_state_dict(source.state_dict())):
            model = change(name)
            load(model)
            for value, expected in zip(model.parameters(), source.parameters(), strict=True):
                assert torch.equal(value, expected)
        plain = VMamba(S1)
        plain.load_state_dict(dict(model.named_parameters()))
        assert_unchanged(plain, source.state_dict())


def test_allowed_differences(tmp_path):
    source = random_backbone(S1)
    state = source.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith('stages.3.')}
    state['stages.0.blocks.0.ssm.extra'] = torch.zeros(2)
    state['stages.1.blocks.0.norm1.bias'] = torch.zeros(5)
    path = saved(tmp_path / 'a.pth', {f'backbone.{k}': v for k, v in state.items()})
    excused = [r'^stages\.3\.', r'^backbone\.stages\.0.*extra$', 'norm1.bias']
    for left in range(3):
        with pytest.raises(UserError, match=['stages.3.* is missing', 'extra is not in the model',
                                             r'bias is \(5,\), in the model \(16,\)'][left]):
            VMamba(S1).load_pretrained(path, allow=excused[:left] + excused[left + 1:])
    model = VMamba(S1, init_cfg=dict(type='Pretrained', checkpoint=path, allow=excused))
    before = snapshot(model)
    model.init_weights()
    for key, value in model.state_dict().items():
        held = key in state and state[key].shape == value.shape
        assert torch.equal(value, state[key] if held else before[key]), key
    state = {k: v for k, v in source.state_dict().items() if 'Ds' not in k}
    path = saved(tmp_path / 'b.pth', state)
    VMamba(S1).load_pretrained(path, allow='Ds$')  # one pattern
    with pytest.raises(UserError, match='Ds is missing'):
        VMamba(S1).load_pretrained(path, strict=False)
    with pytest.raises(UserError, match=r"allow: '\[' is no regular expression"):
        VMamba(S1).load_pretrained(path, allow=['['])


@pytest.mark.parametrize('held, wanted', [
    (S1, S2), (S1, VANILLA), (S1, dict(S1, depths=(1, 1, 3, 1))), (S1, dict(S1, depths=(1,) * 4)),
    (S1, dict(S1, mlp_ratio=0.0)), (dict(S1, mlp_ratio=0.0), S1), (S1, dict(S1, conv_bias=True)),
    (VANILLA, dict(VANILLA, gate=False)), (S1, dict(S1, stem='patch'))])
def test_another_architecture_is_refused_all_the_same(held, wanted, tmp_path):
    path = saved(tmp_path / 'a.pth', random_backbone(held).state_dict())
    model = VMamba(wanted)
    before = snapshot(model)
    with pytest.raises(UserError, match='holds the arch .* neither strict nor allow excuses'):
        model.load_pretrained(path, strict=False, allow=['.*'])
    assert_unchanged(model, before)


# --- other channels ---------------------------------------------------------------------------

@pytest.mark.parametrize('arch', [S1, VANILLA], ids=['conv', 'patch'])
def test_stem_of_other_channels(arch, tmp_path):
    source = random_backbone(arch).eval()
    path = saved(tmp_path / 'a.pth', source.state_dict())
    x = torch.randn(1, 1, 40, 33)
    expected = source(x.expand(-1, 3, -1, -1))
    for channels in (1, 2, 3, 4, 6, 7):
        cfg = dict(type='Pretrained', checkpoint=path, adapt_in_channels=True)
        model = VMamba(arch, in_channels=channels, init_cfg=cfg).eval()
        model.init_weights()
        first = next(model.patch_embed.parameters())
        for i in range(channels if channels > 1 else 0):
            torch.testing.assert_close(
                first[:, i], next(source.parameters())[:, i % 3] * 3 / channels)
        if channels in (1, 3, 6):  # whole rounds: equal channels give what they gave
            for out, want in zip(model(x.expand(-1, channels, -1, -1)), expected, strict=True):
                torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
    model = VMamba(arch, in_channels=6)
    before = snapshot(model)
    with pytest.raises(UserError, match='adapt_in_channels=True.* from 3 to 6 channels'):
        model.load_pretrained(path)
    with pytest.raises(UserError, match='adapt_in_channels=True'):
        model.load_state_dict(source.state_dict())
    assert_unchanged(model, before)
    path = saved(tmp_path / 'b.pth', model.state_dict())
    VMamba(arch, in_channels=1).load_pretrained(path, adapt_in_channels=True)
    with pytest.raises(UserError, match='b.pth: a stem of 6 channels cannot be adapted to 4'):
        VMamba(arch, in_channels=4).load_pretrained(path, adapt_in_channels=True)


def test_keys_of_init_cfg(official_file):
    path, source = official_file
    model = VMamba(S1, init_cfg=dict(type='Pretrained', checkpoint=path, strikt=True))
    with pytest.raises(TypeError, match="no key 'strikt'; its keys are checkpoint, prefix, weights,"
                                        ' map_location, adapt_in_channels, strict, allow'):
        model.init_weights()
    with pytest.raises(TypeError, match="needs the key 'checkpoint'; its keys are checkpoint"):
        VMamba(S1, init_cfg=dict(type='Pretrained')).init_weights()
    from mmengine.model import PretrainedInit
    for kind in (PretrainedInit, 'mmengine.model.PretrainedInit', 'mmengine.Pretrained'):
        model = VMamba(S1, (3,), init_cfg=dict(type=kind, checkpoint=path))
        model.init_weights()
        assert_unchanged(model, source.state_dict())
