"""The wrapper for timm around every family of images, the made-up one too."""

import math

import pytest
import timm
import torch
from specs import SPECS, registered  # noqa: F401 (a fixture for all tests)
from timm.models import FeatureInfo, group_parameters
from timm_models import image
from torch import nn
from zoo_classes import CLASSES

from vmamba_mm import zoo
from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.integrations.timm import register_models

#: {family: its spec, the names of its published archs of images}
FAMILIES = {spec.family.name: (spec, [arch for arch in spec.family.archs
                                      if not spec.takes_clips(arch)])
            for spec in SPECS.values()
            if (spec.family.task, spec.family.takes) == ('cls', 'images')
            and not spec.family.in_timm}
FAMILIES = {name: of_images for name, of_images in FAMILIES.items() if of_images[1]}
each_spec = pytest.mark.parametrize('spec', [spec for spec, _ in FAMILIES.values()], ids=FAMILIES)
each_arch = pytest.mark.parametrize('spec, arch', [
    pytest.param(spec, arch, id=f'{name}-{which}') for name, (spec, _) in FAMILIES.items()
    for which, arch in spec.archs.items() if not spec.takes_clips(arch)])


def create(spec, arch=None, **kwargs):
    """The first of a family's models, on another architecture."""
    register_models(spec.family)
    torch.manual_seed(0)
    name = f'{spec.family.name}_{FAMILIES[spec.family.name][1][0]}'
    return timm.create_model(name, **{'arch': arch or first(spec), 'num_classes': 10, **kwargs})


def first(spec):
    """The first of the small architectures that takes images."""
    return next(arch for arch in spec.archs.values() if not spec.takes_clips(arch))


@each_spec
def test_names_and_weights_are_those_of_the_zoo(spec):
    family = spec.family
    model = register_models(family)
    names = {f'{family.name}_{arch}' for arch in FAMILIES[family.name][1]}
    assert set(timm.list_models(f'{family.name}_*')) == names
    assert model.__name__ == f'Timm{family.model}' and model.model is spec.model
    published = [entry for entry in zoo.entries(family.name, task='cls') if entry.weights]
    found = set(timm.list_models(f'{family.name}_*', pretrained=True))
    assert found == {f'{family.name}_{e.arch}.{e.tag}' for e in published}
    for entry in published:
        cfg = timm.get_pretrained_cfg(f'{family.name}_{entry.arch}.{entry.tag}')
        assert cfg.url == entry.weights and cfg.license == family.licence.lower()


@pytest.mark.parametrize('spec', [spec for spec in SPECS.values() if spec.family.in_timm],
                         ids=lambda spec: spec.family.name)
def test_models_of_timms_own_stay_so(spec):
    for arch in spec.family.archs:
        name = f'{spec.family.name}_{arch}'
        assert timm.models.model_entrypoint(name).__module__.startswith('timm.')


@pytest.mark.parametrize('spec, arch', [pytest.param(spec, arch, id=f'{name}-{arch}')
                                        for name, (spec, archs) in FAMILIES.items()
                                        for arch in archs])
def test_published_architecture(spec, arch):
    register_models(spec.family)
    with torch.device('meta'):
        model = timm.create_model(f'{spec.family.name}_{arch}')
        x = torch.empty(2, *model.default_cfg['input_size'])
        logits, features = model(x), model.forward_features(x)
    state, cfg = model.state_dict(), model.default_cfg
    for entry in zoo.entries(spec.family.name, arch, 'cls'):
        others = (1000 - CLASSES[entry.dataset]) * (model.head.fc.in_features + 1)
        assert sum(p.numel() for p in model.parameters()) - others == entry.parameters
    assert infer_arch(state, spec.family) == arch
    assert logits.shape == (2, model.num_classes) == (2, 1000)
    if spec.model.has_cls_token(spec.family.archs[arch]):
        assert features.shape == (2, 1 + math.prod(cfg['pool_size']), model.num_features)
    else:
        assert features.shape == (2, model.num_features, *cfg['pool_size'])
    assert {name.partition('.')[0] for name in state} == {'backbone', 'head'}
    assert model.get_classifier() is model.head.fc
    assert {f'{cfg["classifier"]}.weight', f'{cfg["first_conv"]}.weight'} <= set(state)
    assert state[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert cfg == model.pretrained_cfg and cfg['custom_load']


@each_arch
@torch.no_grad()
def test_maps(spec, arch):
    model, x = create(spec, arch).eval(), image(64, 64)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert all(name in dict(model.named_modules()) for name in info.module_name())
    features = model.forward_features(x)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, features)
    for y, shape, c, r in zip(maps, spec.shapes(model.backbone.arch, 64, 64), info.channels(),
                              info.reduction(), strict=True):
        assert y.shape == (2, *shape) and shape[0] == c
        # Where patches overlap, the last one begins a patch before the end.
        assert all(64 - 2 * r <= side * r <= 64 for side in shape[1:])
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], map_of(model, features, normed[-1]))
    only = create(spec, arch, features_only=True, out_indices=(0, -1)).eval()(x)
    assert torch.equal(only[0], maps[0]) and torch.equal(only[1], maps[-1])

    pruned = create(spec, arch).eval()
    assert pruned.prune_intermediate_layers([0, -2]) == [0, len(maps) - 2]
    assert torch.equal(map_of(pruned, pruned(x), maps[-2]), maps[-2])
    pruned = create(spec, arch).eval()
    pruned.prune_intermediate_layers([-1], prune_norm=True)
    assert torch.equal(map_of(pruned, pruned(x), maps[-1]), maps[-1])


def map_of(model, features, like):
    """The map in a model's features, which are tokens where it has a class token."""
    if not model.has_cls_token:
        return features
    return features[:, 1:].transpose(1, 2).reshape(like.shape)


@each_arch
@torch.no_grad()
def test_classifiers_read_what_the_published_ones_read(spec, arch):
    """The class token where there is one, else the mean of the map."""
    model, x = create(spec, arch).eval(), image(48, 32)
    kwargs = dict(out_type='cls_token') if model.has_cls_token else {}
    backbone = spec.model(arch, **spec.of_classifiers(arch), **kwargs).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    y = backbone(x)[0]
    torch.testing.assert_close(model(x), model.head.fc(y if y.dim() == 2 else y.mean((2, 3))))
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    mean = create(spec, arch, global_pool='avg').eval()
    mean.load_state_dict(model.state_dict())
    y = map_of(model, model.forward_features(x), backbone.forward_channels_last(x)[0])
    norm = model.backbone.pool_norm if spec.model.has_pool_norm(arch) else nn.Identity()
    torch.testing.assert_close(mean(x), model.head.fc(norm(y.mean((2, 3)))))
    if model.has_cls_token:
        with pytest.raises(ValueError, match="global_pool must be one of .*'token'.*got 'max'"):
            create(spec, arch, global_pool='max')


@each_arch
def test_training(spec, arch):
    """Every parameter has a gradient, the same with checkpointing; its group is its depth."""
    model, grads = create(spec, arch).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(image(32, 48)).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.isfinite().all() for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for name, _ in model.named_parameters():
        depth, num = model.backbone.get_layer_depth(name, 'backbone.')
        # timm's models count the last norm to the last block; mm's to the head
        assert groups[name] == depth - name.startswith('backbone.norm'), name
    assert max(groups.values()) == num - 1


@each_spec
@pytest.mark.parametrize('channels', [3, 1])
def test_official_files(spec, tmp_path, channels):
    backbone = spec.random_model(first(spec), **spec.of_classifiers(first(spec)))
    for state in spec.official_classifiers(backbone, 10):
        file = tmp_path / 'official.pth'
        torch.save({'model': state}, file)
        model = create(spec, pretrained=True, in_chans=channels,
                       pretrained_cfg_overlay=dict(file=str(file), num_classes=10)).eval()
        x = image(48, 32, channels=channels)
        with torch.no_grad():
            expected = backbone.forward_channels_last(x.expand(-1, 3, -1, -1))[0]
            found = map_of(model, model.forward_features(x), expected)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
