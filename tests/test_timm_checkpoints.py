"""Loading through timm: official files, ours and those of its own training."""

import argparse
import json

import pytest
import timm
import torch
from official import shared
from timm_models import SMALL, create, image, stage_maps
from torch import nn

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families.vmamba import ARCHS
from vmamba_mm.testing import assert_close


@pytest.fixture
def official(tmp_path):
    """(file in the official format, the model that it holds)."""
    model = create().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    path = tmp_path / 'official.pth'
    torch.save({'model': to_official(model.state_dict())}, path)
    return path, model


def load(path, kind='tiny_s1l8', overlay=(), **kwargs):
    cfg = dict(file=str(path), num_classes=10)
    cfg.update(overlay)
    return create(kind, pretrained=True, pretrained_cfg_overlay=cfg, **kwargs).eval()


def test_official_file(official):
    path, model = official
    loaded = load(path)
    assert torch.equal(loaded(image(64, 64)), model(image(64, 64)))


def test_converted_file(official, tmp_path):
    model = official[1]
    converted = tmp_path / 'converted.pth'
    torch.save(dict(meta=dict(arch='tiny_s1l8', task='cls'), state_dict=model.state_dict()),
               converted)
    for loaded in (load(converted), create(checkpoint_path=str(converted)).eval(),
                   load(converted, overlay=dict(custom_load=False))):
        assert torch.equal(loaded(image(64, 64)), model(image(64, 64)))


def test_timm_hub_folder(official, tmp_path):
    """The layout of a timm model on the Hugging Face hub."""
    pytest.importorskip('huggingface_hub')
    model = load(official[0])
    timm.models.save_for_hf(model, tmp_path / 'hub')
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    assert torch.equal(loaded(image(64, 64)), model(image(64, 64)))


def test_training_file_of_timm(official, tmp_path, capsys):
    """As its train.py writes it: the averaged weights are taken, as where they are 'model_ema'."""
    model = official[1]
    averaged = timm.utils.ModelEmaV3(model)
    for p in averaged.module.parameters():
        p.data.mul_(0.5)
    saver = timm.utils.CheckpointSaver(model, torch.optim.SGD(model.parameters()),
                                       args=argparse.Namespace(model='vmamba'),
                                       model_ema=averaged, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')
    for weights, expected in (('auto', averaged.module), ('model', model)):
        loaded = create(num_classes=10)
        loaded.pretrained_cfg = dict(num_classes=10)
        loaded.load_pretrained(path, weights)
        assert torch.equal(loaded.head.fc.weight, expected.head.fc.weight)
    assert "averaged weights, 'state_dict_ema', not 'state_dict'" in capsys.readouterr().out


def test_default_link_is_downloaded_and_loaded(official, monkeypatch):
    path, model = official
    asked = []
    monkeypatch.setattr('vmamba_mm.checkpoints.files.fetch', lambda url: asked.append(url) or path)
    for overlay in ({}, dict(url='https://example.org/a.pth')):
        loaded = create(pretrained=True, pretrained_cfg_overlay=dict(overlay, num_classes=10))
        assert torch.equal(loaded.eval()(image(64, 64)), model(image(64, 64)))
    assert asked == [timm.get_pretrained_cfg('vmamba_tiny_s1l8').url, 'https://example.org/a.pth']


def test_features_only_loads(official):
    path, model = official
    for kwargs in ({}, dict(num_classes=0), dict(num_classes=3)):
        maps = load(path, features_only=True, out_indices=(0, 2), **kwargs)(image(64, 64))
        expected = stage_maps(model, image(64, 64))
        assert torch.equal(maps[1], expected[2].permute(0, 3, 1, 2))


@pytest.mark.parametrize('num_classes', [0, 5])
def test_other_classes_start_fresh(official, num_classes):
    path, model = official
    loaded = load(path, num_classes=num_classes)
    x = image(64, 64)
    assert torch.equal(loaded.forward_features(x), model.forward_features(x))
    assert loaded(x).shape == (2, num_classes or 64)
    if num_classes:
        torch.manual_seed(0)
        assert torch.equal(loaded.head.fc.weight, create(num_classes=5).head.fc.weight)


@pytest.mark.parametrize('channels', [1, 4])
def test_other_input_channels(official, channels):
    path, model = official
    loaded = load(path, in_chans=channels)
    x = image(64, 64, channels=1)
    if channels == 1:
        assert_close(loaded(x), model(x.expand(-1, 3, -1, -1)), 1e-4)
    ours, theirs = (m.backbone.patch_embed.conv1.weight for m in (loaded, model))
    expected = theirs.sum(1, keepdim=True) if channels == 1 else theirs[:, [0, 1, 2, 0]] * 3 / 4
    assert_close(ours, expected, 1e-6)
    assert torch.equal(ours, timm.models.adapt_input_conv(channels, theirs))
    assert torch.equal(loaded.backbone.patch_embed.conv2.weight,
                       model.backbone.patch_embed.conv2.weight)


@pytest.mark.parametrize('change, match', [
    (lambda s: s.pop('backbone.stages.1.blocks.0.ssm.Ds'), r'\.blocks\.0\.ssm\.Ds is missing'),
    (lambda s: s.update({'backbone.stages.0.spare': torch.zeros(1)}), 'spare is not in the model'),
    (lambda s: s.update({'backbone.norm0.weight': torch.ones(8)}), 'norm0.weight is not in'),
    (lambda s: s.pop('head.fc.weight'), 'head.fc.weight is missing'),
    (lambda s: [s.pop('head.fc.weight'), s.pop('head.fc.bias')], 'of 0 classes, the model has 10'),
    (lambda s: [s.pop(k) for k in list(s) if 'backbone' in k], 'holds no VMamba'),
], ids=['missing', 'spare', 'dense', 'half-a-head', 'headless', 'no-backbone'])
def test_what_does_not_fit_raises(official, tmp_path, change, match):
    state = official[1].state_dict()
    change(state)
    file = tmp_path / 'changed.pth'
    torch.save(dict(meta={}, state_dict=state), file)
    model = create(pretrained_cfg_overlay=dict(num_classes=10))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=match):
        model.load_pretrained(str(file))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_was_not_asked_for_raises(official):
    path, model = official
    with pytest.raises(UserError, match="does not fit the model: .* the arch.*'stem': 'conv'"):
        load(path, 'vanilla_tiny')
    # 1000 is what pretrained_cfg promises, so nobody asked for a fresh classifier
    with pytest.raises(UserError, match='10 classes, the model has 1000: .*num_classes=10'):
        load(path, overlay=dict(num_classes=1000), num_classes=1000)
    assert torch.equal(load(path, overlay=dict(num_classes=1000)).head.fc.bias, model.head.fc.bias)
    with pytest.raises(ValueError, match='weights='):
        create().load_pretrained(str(path), weights='ema')


@torch.no_grad()
def test_same_as_mmpretrain(official, mm):
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS, DefaultScope
    path, model = official
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmpretrain.models  # noqa: F401
        classifier = MODELS.build(dict(
            type='ImageClassifier',
            backbone=dict(type='vmamba_mm.VMamba', arch=SMALL['tiny_s1l8'], out_indices=(3,)),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=64))).eval()
    classifier.load_state_dict(load(path).state_dict())
    assert_close(load(path)(image(97, 131)), classifier(image(97, 131)), 1e-6)


@pytest.mark.parametrize('name, kind', [('s1', 'tiny_s1l8'), ('s2', 'tiny_s2l5'),
                                        ('vanilla', 'vanilla_tiny')])
@torch.no_grad()
def test_parity(name, kind):
    folder = shared('parity')
    given = json.loads((folder / f'{name}.json').read_text())['arguments']
    arch = dict(ARCHS[kind], embed_dims=given['dims'], depths=tuple(given['depths']))
    model = timm.create_model(
        f'vmamba_{kind}', arch=arch, num_classes=10, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(folder / f'{name}.cls.pth'))).eval()
    for case in torch.load(folder / f'{name}.expected.pt', weights_only=True)['cases']:
        assert_close(model(case['input']), case['logits'], 1e-4)
