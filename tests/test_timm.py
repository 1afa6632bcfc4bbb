"""timm's conventions, as its own test suite asks for them."""

import pytest
import timm
import timm.data
import timm.optim
import torch
from timm.models import FeatureInfo
from timm_models import BOTH, CHANNELS, SMALL, create, image, stage_maps
from torch import nn

from vmamba_mm.testing import assert_close


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
