"""timm's conventions, as its own test suite asks for them, and loading through timm."""
import argparse
import json
from pathlib import Path

import pytest
import timm
import timm.data
import timm.optim
import torch
from test_configs import VARIANTS
from timm.models import FeatureInfo
from torch import nn

import vmamba_mm.timm  # noqa: F401 (registers the models)
from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families.vmamba import ARCH_SETTINGS
from vmamba_mm.testing import assert_close

REPO = Path(__file__).resolve().parents[1]
PARITY = REPO.parent / 'shared' / 'parity'
#: one of either kind, small; the entry gives everything that an arch does not
SMALL = {name: dict(ARCH_SETTINGS[name], embed_dims=8, depths=(1, 1, 2, 1), d_state=d_state)
         for name, d_state in (('tiny_s1l8', 1), ('vanilla_tiny', 2))}
BOTH = pytest.mark.parametrize('kind', SMALL)
CHANNELS = [8, 16, 32, 64]


def create(kind='tiny_s1l8', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'vmamba_{kind}', **{'arch': SMALL[kind], 'num_classes': 10, **kwargs})


def image(*shape, channels=3):
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(1))


# -- the nine ------------------------------------------------------------------------------

def test_registered():
    names = {f'vmamba_{arch}' for arch in ARCH_SETTINGS}
    assert set(timm.list_models('vmamba*')) == names
    with_weights = timm.list_models('vmamba*', pretrained=True)
    assert set(with_weights) == {f'{n}.in1k' for n in names} | {'vmamba_vanilla_base.dp05_in1k'}


@pytest.mark.parametrize('variant', VARIANTS)
def test_variant(variant):
    arch = variant.replace('-', '_')
    with torch.device('meta'):
        model = timm.create_model(f'vmamba_{arch}')
        logits = model(torch.empty(2, 3, 224, 224))
        features = model.forward_features(torch.empty(2, 3, 224, 224))
    state, cfg = model.state_dict(), model.default_cfg
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[variant][0]
    assert infer_arch(state) == arch
    assert logits.shape == (2, model.num_classes) == (2, 1000)
    assert features.shape == (2, model.num_features, *cfg['pool_size'])
    assert {name.partition('.')[0] for name in state} == {'backbone', 'head'}
    assert model.get_classifier() is model.head.fc
    for key in ('classifier', 'first_conv'):
        assert f'{cfg[key]}.weight' in state
    assert state[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert cfg == model.pretrained_cfg and cfg['license'] == 'mit' and cfg['custom_load']


def test_links_are_those_of_the_zoo():
    yaml = pytest.importorskip('yaml')
    rows = yaml.safe_load((REPO / 'configs/vmamba/metafile.yml').read_text())['Models']
    links = {row['Name'].split('_')[0].replace('-', '_'): row['Weights'] for row in rows}
    found = {f'vmamba_{arch}': timm.get_pretrained_cfg(f'vmamba_{arch}').url
             for arch in ARCH_SETTINGS}
    assert found.items() <= links.items()


def test_data_config_is_the_published_evaluation():
    config = timm.data.resolve_model_data_config(create())
    transform = timm.data.create_transform(**config)
    resize, crop = transform.transforms[:2]
    assert (resize.size, resize.interpolation.value) == (256, 'bicubic')
    assert tuple(crop.size) == (224, 224)
    assert config['mean'] == (0.485, 0.456, 0.406) and config['std'] == (0.229, 0.224, 0.225)


# -- forward and backward --------------------------------------------------------------------

@BOTH
@pytest.mark.parametrize('size, channels', [((32, 32), 3), ((97, 131), 3), ((7, 33), 1),
                                            ((64, 32), 4)])
def test_forward(kind, size, channels):
    model = create(kind, in_chans=channels).eval()
    out = model(image(*size, channels=channels))
    assert out.shape == (2, 10) and out.isfinite().all() and model.in_chans == channels
    alone = model(image(*size, channels=channels)[1:])
    assert_close(alone, out[1:], 1e-5)


@BOTH
def test_every_parameter_has_a_gradient(kind):
    model = create(kind).train()
    model(image(64, 64)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@BOTH
def test_checkpointing_recomputes_and_keeps_the_gradients(kind):
    model, grads, calls = create(kind).train(), [], []
    model.backbone.stages[2].blocks[1].norm1.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 1), (True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        model(image(32, 32)).square().sum().backward()
        assert len(calls) == expected
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[1], strict=True))


def test_export():
    model = create().eval()
    exported = torch.export.export(model, (image(32, 32),)).module()
    assert_close(exported(image(32, 32)), model(image(32, 32)), 1e-6)


@pytest.mark.parametrize('scan', ['unidirectional', 'bidirectional', 'cascade'])
def test_other_scans(tmp_path, scan):
    """Of one set of weights, which a file keeps as any other's."""
    arch = dict(SMALL['tiny_s1l8'], scan=scan)
    cross, model = create().eval(), create(arch=arch).eval()
    torch.save(cross.state_dict(), tmp_path / 'cross.pth')
    again = create(arch=arch, checkpoint_path=str(tmp_path / 'cross.pth')).eval()
    x = image(32, 40)
    assert torch.equal(again(x), model(x)) and not torch.allclose(model(x), cross(x))
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), model(x), 1e-6)


def test_drop_rates():
    model = create(drop_rate=0.3, drop_path_rate=0.4)
    assert model.head.drop.p == 0.3
    blocks = [b for stage in model.backbone.stages for b in stage.blocks]
    assert [b.drop_path.drop_prob for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_device_and_dtype():
    assert all(p.is_meta for p in create(device='meta').parameters())
    model = create(dtype=torch.float64).eval()
    assert model(image(32, 32).double()).dtype == torch.float64
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float64


# -- the head ----------------------------------------------------------------------------------

def test_head():
    model = create().eval()
    features = model.forward_features(image(64, 64))
    assert features.shape == (2, model.num_features, 2, 2)
    pre = model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, model.head_hidden_size) == (2, 64)
    assert_close(pre, features.mean((2, 3)), 1e-6)
    assert_close(model(image(64, 64)), model.head.fc(pre), 1e-6)
    # As published: a normed map, a classifier that starts at std 0.02 and bias 0.
    assert features.mean(1).abs().max() < 1e-5
    assert 0.015 < model.head.fc.weight.std() < 0.025 and not model.head.fc.bias.any()


def test_reset_classifier():
    model = create().eval()
    pre = model.forward_head(model.forward_features(image(64, 64)), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(image(64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(image(64, 64)), pre)
    model.reset_classifier(0, '')
    assert torch.equal(model(image(64, 64)), model.forward_features(image(64, 64)))
    with pytest.raises(ValueError, match="global_pool=''.*num_classes=5"):
        model.reset_classifier(5)
    assert model.num_classes == 0
    model.reset_classifier(5, 'catavgmax')
    assert model.head_hidden_size == 128 and model(image(64, 64)).shape == (2, 5)


@pytest.mark.parametrize('pool', ['avg', 'max', 'avgmax', 'catavgmax', 'fast'])
def test_pooling(pool):
    model = create(num_classes=0, global_pool=pool).eval()
    features = model.forward_features(image(64, 64)).flatten(2)
    avg, top = features.mean(2), features.amax(2)
    expected = dict(avg=avg, max=top, avgmax=(avg + top) / 2, catavgmax=torch.cat([avg, top], 1),
                    fast=avg)[pool]
    assert_close(model(image(64, 64)), expected, 1e-6)


def test_no_pooling():
    model = create(num_classes=0, global_pool='').eval()
    assert model(image(64, 64)).shape == (2, 64, 2, 2)


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(num_classes=-1), ValueError, 'num_classes .* at least 0, got -1'),
    (dict(num_classes='10'), ValueError, "num_classes .* got '10'"),
    (dict(global_pool='mean'), ValueError, "one of .*'avg'.* got 'mean'"),
    (dict(global_pool=''), ValueError, "global_pool='' .* num_classes=10"),
    (dict(in_chans=0), ValueError, 'in_channels'),
    (dict(drop_path_rate=1.0), ValueError, 'drop_path_rate'),
    (dict(arch='tiny'), ValueError, "arch='tiny' does not exist; choose one of"),
    (dict(arch=dict(SMALL['tiny_s1l8'], scan='zigzag')), ValueError, "scan='zigzag' .*'cascade'"),
    (dict(img_size=224), TypeError, 'img_size'),
    (dict(features_only=True, feature_cls='list'), ValueError, "must be 'getter', got 'list'"),
])
def test_wrong_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        create(**kwargs)


# -- features ----------------------------------------------------------------------------------

def stage_maps(model, x):
    """What the blocks of each stage give inside the model's own forward, (B, H, W, C)."""
    maps = []
    hooks = [stage.blocks.register_forward_hook(lambda _, __, y: maps.append(y))
             for stage in model.backbone.stages]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return maps


@BOTH
@pytest.mark.parametrize('size', [(64, 64), (97, 131)])
@torch.no_grad()
def test_forward_intermediates(kind, size):
    model, x = create(kind).eval(), image(*size)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert info.channels() == CHANNELS and info.reduction() == [4, 8, 16, 32]
    modules = dict(model.named_modules())
    assert all(name in modules for name in info.module_name())

    expected, features = stage_maps(model, x), model.forward_features(x)
    last, maps = model.forward_intermediates(x)
    assert torch.equal(last, features)
    for m, e, c, r in zip(maps, expected, CHANNELS, info.reduction(), strict=True):
        assert m.is_contiguous() and torch.equal(m, e.permute(0, 3, 1, 2))
        assert m.shape[1] == c
        assert all(s // r - 1 <= n <= -(-s // r) for n, s in zip(m.shape[2:], size, strict=True))

    last, maps = model.forward_intermediates(x, output_fmt='NHWC')
    assert torch.equal(last, features)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))

    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[3], features)
    assert torch.equal(normed[2], expected[2].permute(0, 3, 1, 2))


@pytest.mark.parametrize('indices, expected', [(None, [0, 1, 2, 3]), (2, [2, 3]), ([1], [1]),
                                               ([0, -2], [0, 2]), ((1, 3), [1, 3])])
@torch.no_grad()
def test_indices(indices, expected):
    model, x = create().eval(), image(64, 64)
    every = model.forward_intermediates(x, intermediates_only=True)
    some = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert all(torch.equal(m, every[i]) for m, i in zip(some, expected, strict=True))


@torch.no_grad()
def test_stop_early():
    model, x, calls = create().eval(), image(64, 64), []
    for i in range(4):
        model.backbone.stages[i].blocks.register_forward_hook(lambda *_, i=i: calls.append(i))
        if i < 3:
            model.backbone.stages[i].downsample.register_forward_hook(
                lambda *_, i=i: calls.append(f'down{i}'))
    last, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert calls == [0, 'down0', 1]
    assert torch.equal(last, maps[0])
    calls.clear()
    last, maps = model.forward_intermediates(x, indices=[1])
    assert calls[-1] == 3 and last.shape[1] == 64 and len(maps) == 1


def test_wrong_format_and_index():
    model = create()
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(image(32, 32), output_fmt='NLC')
    with pytest.raises(AssertionError, match=r'index 4 is out of range \(0 to 3\)'):  # timm's own
        create(features_only=True, out_indices=(0, 4))


@BOTH
@pytest.mark.parametrize('out_indices', [None, (1, 3), (0, 1), (-3,)])
def test_features_only(kind, out_indices):
    whole, x = create(kind).train(), image(97, 131)
    expected = stage_maps(whole, x)
    # num_classes plays no part, and the same seed gives the same weights.
    model = create(kind, features_only=True, out_indices=out_indices).train()
    taken = [i % 4 for i in out_indices or range(4)]
    assert model.feature_info.channels() == [CHANNELS[i] for i in taken]
    assert model.feature_info.reduction() == [4 * 2**i for i in taken]
    maps = model(x)
    for m, i in zip(maps, taken, strict=True):
        assert m.is_contiguous() and torch.equal(m, expected[i].permute(0, 3, 1, 2))
    sum(m.square().sum() for m in maps).backward()
    # DistributedDataParallel stops at parameters that take no part.
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_prune():
    x = image(64, 64)
    expected = create().eval().forward_intermediates(x, intermediates_only=True)

    model = create().eval()
    assert model.prune_intermediate_layers([0, -2]) == [0, 2]
    assert model.num_features == model.head_hidden_size == 32 and model.num_classes == 0
    last, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(last, expected[2]) and torch.equal(maps[2], last)
    assert torch.equal(model(x), last)
    model.reset_classifier(6, 'avg')
    assert model(x).shape == (2, 6)
    assert not any('norm3' in name or 'stages.3' in name for name in model.state_dict())

    model = create().eval()
    logits, features = model(x), model.forward_features(x)
    assert model.prune_intermediate_layers(2, prune_head=False) == [2, 3]
    assert torch.equal(model(x), logits)
    model.prune_intermediate_layers([3], prune_norm=True)
    assert torch.equal(model(x), expected[3]) and not torch.equal(model(x), features)


# -- training ----------------------------------------------------------------------------------

@BOTH
def test_layer_groups_are_those_of_the_backbone(kind):
    from timm.models import group_parameters
    model = create(kind)
    found = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    for name, _ in model.named_parameters():
        depth, num = model.backbone.get_layer_depth(name, 'backbone.')
        # timm's models count the last norm to the last block; mm's to the head
        assert found[name] == depth - name.startswith('backbone.norm3'), name
    assert max(found.values()) == num - 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse['backbone.patch_embed.norm.weight' if 'vanilla' in kind
                  else 'backbone.patch_embed.norm1.weight'] == 0
    assert [coarse[f'backbone.stages.{i}.blocks.0.ssm.Ds'] for i in range(4)] == [1, 2, 3, 4]
    assert coarse['head.fc.weight'] == 5


def test_train_step():
    model = create(drop_path_rate=0.1).train()
    optimizer = timm.optim.create_optimizer_v2(
        model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: g for g in optimizer.param_groups for p in g['params']}
    assert set(groups) == set(names.values())
    for name, p in model.named_parameters():
        assert groups[name]['weight_decay'] == (0.05 if p.ndim > 1 else 0.), name
    scales = [groups[n]['lr_scale'] for n in (
        'backbone.patch_embed.conv1.weight', 'backbone.stages.2.blocks.1.ssm.A_logs',
        'head.fc.weight')]
    assert scales == [0.5**6, 0.5**2, 1.]

    x, y = image(32, 32), torch.tensor([3, 4])
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# -- checkpoints -------------------------------------------------------------------------------

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


@pytest.mark.skipif(not PARITY.exists(), reason='needs ../shared/parity, which a clone lacks')
@pytest.mark.parametrize('name, kind', [('s1', 'tiny_s1l8'), ('s2', 'tiny_s2l5'),
                                        ('vanilla', 'vanilla_tiny')])
@torch.no_grad()
def test_parity(name, kind):
    given = json.loads((PARITY / f'{name}.json').read_text())['arguments']
    arch = dict(ARCH_SETTINGS[kind], embed_dims=given['dims'], depths=tuple(given['depths']))
    model = timm.create_model(
        f'vmamba_{kind}', arch=arch, num_classes=10, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(PARITY / f'{name}.cls.pth'))).eval()
    for case in torch.load(PARITY / f'{name}.expected.pt', weights_only=True)['cases']:
        assert_close(model(case['input']), case['logits'], 1e-4)
