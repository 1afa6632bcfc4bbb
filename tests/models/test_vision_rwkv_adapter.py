"""Vision-RWKV with its adapter for dense tasks; test_check_parity.py has the official numbers."""

import re

import pytest
import torch
from mmengine.runner import load_checkpoint
from official import listed_keys
from torch import nn

from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.errors import UserError
from vmamba_mm.models import VisionRWKV, VisionRWKVAdapter
from vmamba_mm.models.vision_rwkv_adapter import deformable_attention
from vmamba_mm.testing import assert_close

SMALL = dict(embed_dims=12, depth=4, patch_size=16, image_size=64, formula='official')
FEW = dict(conv_inplane=4, deform_num_heads=3, n_points=2)
#: The archs of published detectors and segmentors.
PUBLISHED = dict(t=dict(base='tiny', layer_scale=1.0), s='small', b='base', l='large')


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = VisionRWKVAdapter(**{**dict(arch=SMALL), **FEW, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def official(model, prefix=''):
    """Its weights as official files have them."""
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace('patch_embed.proj.', 'patch_embed.projection.')
        state[prefix + re.sub(r'^blocks\.', 'layers.', key)] = value
    return state


@pytest.mark.parametrize('features', ['last', 'each'])
def test_maps_and_gradients(features):
    model = make(features=features, with_cp=features == 'each', drop_path_rate=0.1).train()
    images = torch.randn(2, 3, 64, 96, requires_grad=True)
    maps = model(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, 12, 16, 24), (2, 12, 8, 12), (2, 12, 4, 6), (2, 12, 2, 3)]
    assert all(m.is_contiguous() for m in maps)
    sum(m.square().sum() for m in maps).backward()
    lacking = [name for name, p in model.named_parameters()
               if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking and images.grad.isfinite().all()


def test_features_differ_but_for_the_last():
    images = torch.randn(1, 3, 32, 64)
    last, each = (make(features=features)(images) for features in ('last', 'each'))
    assert torch.equal(last[3], each[3])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(last[:3], each[:3], strict=True))


def test_deformable_attention_by_hand():
    """At the middle of a position it reads that position, and between two their mean."""
    sizes = [(2, 3), (1, 2)]
    value = torch.randn(1, 8, 2, 5, dtype=torch.float64)
    places = torch.tensor([[[0.5, 0.75], [0.25, 0.5]], [[1 / 3, 0.25], [0.5, 0.5]]],
                          dtype=torch.float64)
    locations = places[None, :, None, :, None].expand(1, 2, 2, 2, 1, 2)
    weights = torch.rand(1, 2, 2, 2, 1, dtype=torch.float64)
    y = deformable_attention(value, sizes, locations, weights).view(2, 2, 5)
    read = [[value[0, 4], value[0, 6]], [value[0, :2].mean(0), value[0, 6:].mean(0)]]
    for q in range(2):
        expected = sum(weights[0, q, :, i] * read[q][i] for i in range(2))
        assert_close(y[q], expected, 1e-12)


def test_official_files_load_inside_a_model(tmp_path):
    source = make()
    torch.save(dict(state_dict=official(source, 'backbone.'), meta={}), tmp_path / 'a.pth')
    model = nn.ModuleDict(dict(backbone=make(seed=1)))
    load_checkpoint(model, str(tmp_path / 'a.pth'), strict=True)
    other = make(seed=2)
    assert other.load_state_dict(official(source))
    for found in (model['backbone'], other):
        for name, value in source.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
    lacking = official(source)
    del lacking['spm.fc2.bias']
    with pytest.raises(UserError, match=r'spm\.fc2\.bias is missing'):
        other.load_state_dict(lacking)


def test_places_are_not_rounded_to_half_precision():
    """Columns of 0 and 1 in turn tell where between two of them a map was read."""
    columns = (torch.arange(256) % 2)[None, :, None, None].bfloat16()
    place = torch.tensor([240.75 / 256, 0.5]).view(1, 1, 1, 1, 1, 2)
    y = deformable_attention(columns, [(1, 256)], place, torch.ones(1, 1, 1, 1, 1).bfloat16())
    assert y.dtype == torch.bfloat16 and y.item() == 0.25


def test_detectors_convert_there_and_back(call, tmp_path):
    """With arguments that are no published ones; half of an adapter is refused."""
    ours = {f'backbone.{key}': value for key, value in make(deform_ratio=0.5).state_dict().items()}
    ours |= {'roi_head.bbox_head.fc_cls.bias': torch.zeros(3)}
    files = [tmp_path / f'{i}.pth' for i in range(3)]
    torch.save(dict(state_dict=ours, meta={}), files[0])
    for i, options in enumerate((('--to', 'official'), ())):
        code, out, err = call('convert_checkpoint.py', files[i], files[i + 1], *options)
        assert code == 0 and 'task det' in out, err
    states = [torch.load(file, weights_only=True)['state_dict'] for file in files]
    assert 'backbone.layers.0.ln0.weight' in states[1] and 'backbone.spm.fc1.weight' in states[1]
    for state in (states[0], states[2]):
        assert state.keys() == ours.keys()
        assert all(torch.equal(state[key], value) for key, value in ours.items())
    for name, message in (('up.bias', 'up.bias is missing'),
                          ('spm.stem.0.weight', "but lack 'spm.stem.0.weight'")):
        lacking = {key: value for key, value in ours.items() if key != f'backbone.{name}'}
        torch.save(dict(state_dict=lacking, meta={}), files[0])
        code, _, err = call('convert_checkpoint.py', files[0], tmp_path / 'half.pth')
        assert code == 1 and message in err


def test_arguments_of_a_backbone():
    """They are of all of the model, and frozen stages of the backbone alone."""
    compile = dict(backend='eager', fullgraph=True)
    model = make(frozen_stages=4, norm_eval=True, compile=compile).train()
    frozen = {name.partition('.')[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {'patch_embed', 'pos_embed', 'blocks'}
    assert not model.norm2.training and not model.spm.stem[1].training and model.spm.training
    images = torch.randn(1, 3, 32, 32)
    expected = make(norm_eval=True).train()(images)
    for found, right in zip(model(images), expected, strict=True):
        assert_close(found, right, 1e-5)
    assert model._compiled_call_impl is not None
    with pytest.raises(ValueError, match="out_type='raw' does not exist"):
        make(out_type='raw')


def test_classifier_as_a_start(tmp_path):
    """The norm at its end is of no use here, and factors that it has not are 1."""
    torch.manual_seed(3)
    source = VisionRWKV(SMALL)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    start = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    model = VisionRWKVAdapter(SMALL, init_cfg=start, **FEW)
    model.init_weights()
    for name, value in source.state_dict().items():
        assert name.startswith('norm') or torch.equal(model.state_dict()[name], value), name
    scaled = dict(SMALL, layer_scale=1.0)
    model = VisionRWKVAdapter(scaled, init_cfg=start, **FEW)
    model.init_weights()
    assert torch.equal(model.blocks[2].att.key.weight, source.blocks[2].att.key.weight)
    assert model.blocks[2].gamma1.unique().tolist() == [1.0]
    model = VisionRWKVAdapter(dict(scaled, layer_scale=0.5), init_cfg=start, **FEW)
    with pytest.raises(UserError, match='gamma1 is missing'):
        model.init_weights()


def test_wrong_arguments_and_images():
    for kwargs, message in (
            (dict(features='all'), "features='all' does not exist.*'last', 'each'"),
            (dict(arch=dict(SMALL, patch_size=8)), 'patches of 16 pixels'),
            (dict(arch=dict(SMALL, depth=3)), 'at least 4 blocks'),
            (dict(interactions=[(0, 1), (2, 3)]), 'interactions must be.*four parts'),
            (dict(interactions=[(0, 0), (1, 1), (3, 3), (2, 2)]), 'in order'),
            (dict(deform_num_heads=5), 'deform_num_heads=5 must divide the 12')):
        with pytest.raises(ValueError, match=message):
            make(**kwargs)
    with pytest.raises(UserError, match='multiples of 32 pixels, got 33x64'):
        make()(torch.randn(1, 3, 33, 64))


def test_layer_depths():
    model = make()
    for name, depth in (('pos_embed', 0), ('blocks.2.gamma1', 3), ('spm.fc1.weight', 5),
                        ('norm3.weight', 5), ('interactions.0.injector.gamma', 5)):
        assert model.get_layer_depth(name) == (depth, 6)
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 6)


@pytest.mark.parametrize('size', PUBLISHED)
def test_published_keys(size):
    """Names and shapes, where a list of them is at hand."""
    keys = listed_keys('vision_rwkv', {size: f'vrwkv_adapter_{size}'})
    if keys is None:
        pytest.skip('no list of the official keys beside the checkout')
    with torch.device('meta'):
        model = VisionRWKVAdapter(PUBLISHED[size])
    assert {key: tuple(value.shape) for key, value in official(model).items()} == keys[size]
    inferred = infer_arch(official(model, 'backbone.'))
    arch = PUBLISHED[size]
    assert inferred == (arch if isinstance(arch, str) else model.arch)
