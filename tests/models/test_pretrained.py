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

from vmamba_mm.checkpoint import to_mm
from vmamba_mm.compat import UserError
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
