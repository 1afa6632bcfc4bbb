"""Weights into VMamba that tests/test_pretrained.py does not have: what users put into it."""

import pytest
import torch
from official import (
    S1,
    S2,
    VANILLA,
    classifier_state,
    random_backbone,
    save_training_file,
)
from torch import nn

from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError
from vmamba_mm.models import VMamba

SSD = dict(S1, d_state=3, core='ssd')


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


@pytest.mark.parametrize('held, wanted', [
    (S2, S1), (S1, VANILLA), (VANILLA, S2), (SSD, S1), (S1, SSD)])
def test_another_variant_is_refused(held, wanted, tmp_path):
    path = str(save_training_file(tmp_path / 'a.pth', classifier_state(random_backbone(held, (3,)),
                                                                       10)))
    model = VMamba(wanted, init_cfg=dict(type='Pretrained', checkpoint=path))
    before = snapshot(model)
    with pytest.raises(UserError, match=f"a.pth does not fit.*'ssm_ratio': {held['ssm_ratio']}"):
        model.init_weights()
    assert_unchanged(model, before)


@pytest.mark.parametrize('arch, lacking', [
    (S1, 'dt_projs_weight'), (S1, 'out_norm.weight'), (S1, 'Ds'), (SSD, 'Ds'), (SSD, 'A_logs')])
def test_what_a_variant_lacks_is_named(arch, lacking):
    """The weights of SS2D and of SSD2D that the other has not are missed as all others are."""
    name = f'stages.2.blocks.0.ssm.{lacking}'
    state = {k: v for k, v in random_backbone(arch).state_dict().items() if k != name}
    with pytest.raises(UserError, match=f'like those of a VMamba, but lack .{name}'):
        to_mm(state)


def test_classifier_into_a_detector_is_refused(mm, official_file):
    """mmengine would log the norms and heads that stay random, and go on."""
    from mmengine.runner import load_checkpoint

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = VMamba(S1)

    with pytest.raises(UserError, match='norm0.weight is missing'):
        load_checkpoint(Detector(), official_file[0])


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
