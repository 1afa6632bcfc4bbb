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
