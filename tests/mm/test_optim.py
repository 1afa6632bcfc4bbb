import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

GROUPED = 'vmamba_mm.GroupedOptimWrapperConstructor'
PARAMWISE = dict(norm_decay_mult=0., bias_decay_mult=0.,
                 custom_keys={'head': dict(lr_mult=10.), 'stem.weight': dict(decay_mult=0.)})


def make_model():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(
        stem=nn.Linear(4, 4), norm=nn.LayerNorm(4), body=nn.Sequential(nn.Linear(4, 4),
                                                                      nn.Linear(4, 4)),
        head=nn.Linear(4, 2)))
    model['body'][1].weight.requires_grad_(False)
    return model


def build(model, paramwise_cfg=PARAMWISE, **kwargs):
    return build_optim_wrapper(model, dict(
        type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.2),
        paramwise_cfg=paramwise_cfg, **kwargs))


def settings_of(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: {k: v for k, v in group.items() if k != 'params'}
            for group in optimizer.param_groups for p in group['params']}


def test_the_settings_of_each_parameter_are_mmengines():
    model = make_model()
    one, other = build(model).optimizer, build(model, constructor=GROUPED).optimizer
    assert settings_of(one, model) == settings_of(other, model)
    assert len(one.param_groups) == 9
    # decayed; not decayed; the head, weight and bias alike; stem.weight
    assert len(other.param_groups) == 4


def test_the_update_is_the_same():
    models = [make_model() for _ in range(2)]
    for model, kwargs in zip(models, ({}, dict(constructor=GROUPED)), strict=True):
        optimizer = build(model, **kwargs).optimizer
        for step in range(3):
            optimizer.zero_grad()
            sum((p * (step + 1)).square().sum() for p in model.parameters()).backward()
            optimizer.step()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize('paramwise_cfg', [None, dict(bypass_duplicate=True)], ids=str)
def test_shared_parameters_and_no_rules(paramwise_cfg):
    model = make_model()
    model['again'] = model['stem']
    optimizer = build(model, copy.deepcopy(paramwise_cfg), constructor=GROUPED).optimizer
    assert len(optimizer.param_groups) == 1
    assert {id(p) for p in optimizer.param_groups[0]['params']} >= {
        id(p) for p in model.parameters() if p.requires_grad}


# --- layer decay ----------------------------------------------------------------------------------

LAYER_DECAY = 'vmamba_mm.LayerDecayOptimWrapperConstructor'


def make_detector():
    from vmamba_mm.models import Vim
    arch = dict(base='tiny', embed_dims=8, depth=3, image_size=32)
    return nn.ModuleDict(dict(backbone=Vim(arch), neck=nn.Linear(8, 8)))


def test_layer_decay():
    """A factor for each block between a parameter and the head; other settings as they were."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.neck = make_detector().values()

    model = Model()
    rules = dict(custom_keys={'pos_embed': dict(decay_mult=0.), 'neck': dict(lr_mult=2.)})
    plain = settings_of(build(model, rules, constructor=GROUPED).optimizer, model)
    found = settings_of(build(model, dict(rules, layer_decay_rate=0.5),
                              constructor=LAYER_DECAY).optimizer, model)
    factors = {'backbone.cls_token': 1 / 16, 'backbone.pos_embed': 1 / 16,
               'backbone.patch_embed.proj.bias': 1 / 16, 'backbone.blocks.0.norm.weight': 1 / 8,
               'backbone.blocks.2.mixer.A_log': 1 / 2, 'backbone.norm2.weight': 1,
               'neck.weight': 1}
    for name, factor in factors.items():
        assert found[name]['lr'] == pytest.approx(plain[name]['lr'] * factor), name
    for name, settings in found.items():
        assert {**settings, 'lr': 0} == {**plain[name], 'lr': 0}, name
    assert len({repr(s) for s in found.values()}) == len(build(
        model, dict(rules, layer_decay_rate=0.5), constructor=LAYER_DECAY).optimizer.param_groups)


@pytest.mark.parametrize('rate', [None, 0, 1.5, 'half'])
def test_layer_decay_of_no_rate(rate):
    from vmamba_mm.errors import UserError
    with pytest.raises(UserError, match=r'layer_decay_rate above 0 and up to 1, got'):
        build(make_model(), {} if rate is None else dict(layer_decay_rate=rate),
              constructor=LAYER_DECAY)
