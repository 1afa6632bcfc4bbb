"""What is special about PointMamba: batches, versions, pre-training, parts, bad clouds."""

import copy

import pytest
import torch
from official import shared
from specs import SPECS

from vmamba_mm.errors import UserError
from vmamba_mm.heads import (
    MaskedPointMamba,
    PartSegHead,
    PointClassifier,
    PointHead,
    PointPreprocessor,
    PointSegmentor,
)
from vmamba_mm.layers import mamba_blocks
from vmamba_mm.models import PointMamba
from vmamba_mm.testing import relative_error

HILBERT, AXES, CLASS = SPECS['pointmamba'].archs.values()
SMALL = dict(HILBERT, num_groups=12, group_size=6)
ORDERS = pytest.mark.parametrize('arch', [SMALL, dict(AXES, num_groups=12, group_size=6),
                                          dict(CLASS, num_groups=12, group_size=6)],
                                 ids=['hilbert', 'axes', 'cls'])


def clouds(batch=3, count=60):
    torch.manual_seed(0)
    points = torch.randn(batch, count, 3)
    return points / points.norm(dim=2).amax(1, keepdim=True).unsqueeze(2)


def part_model(arch, classes=9, **kwargs):
    backbone = PointMamba(arch, (0, 2), 'raw')
    return PointSegmentor(backbone, PartSegHead([8, 8], classes, 4, **kwargs))


@ORDERS
def test_a_cloud_gives_the_same_alone_and_in_a_batch(arch):
    model = PointMamba(arch).eval()
    points = clouds() * torch.tensor([1.0, 0.3, 4.0]).view(3, 1, 1)
    whole, = model(points)
    for i in range(3):
        torch.testing.assert_close(model(points[i:i + 1])[0], whole[i:i + 1])


def test_the_batch_of_the_public_code():
    """The order of a cloud depends on the largest of the batch, if asked for."""
    points = torch.cat([clouds(1), clouds(1) * 30])
    model = PointMamba(SMALL, curve_depth='batch').eval()
    (whole,), (alone,) = model(points), model(points[:1])
    assert (whole[:1] - alone).abs().max() > 1e-3
    with pytest.raises(ValueError, match="curve_depth=8 .*'fixed', 'cloud', 'batch'"):
        PointMamba(SMALL, curve_depth=8)


@ORDERS
def test_points_in_any_order_behind_the_first(arch):
    """The first point is the first centre; the order of the others means nothing."""
    model, points = PointMamba(arch).eval(), clouds(2)
    mixed = points[:, [0, *(1 + torch.randperm(59)).tolist()]]
    torch.testing.assert_close(model(mixed), model(points), rtol=1e-4, atol=1e-5)


def test_outputs_share_the_norm_and_dropout_is_of_training():
    model = PointMamba(SMALL, (0, 2), 'raw', drop_rate=0.4)
    first, last = model.eval()(clouds())
    torch.testing.assert_close(last.mean(2), torch.zeros_like(last[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.mean(2), torch.zeros_like(first[..., 0]), atol=1e-5, rtol=0)
    encoded = model.encode(clouds())
    assert encoded.orders.shape == (3, 2, 12) and encoded.centres.shape == (3, 12, 3)
    assert torch.equal(encoded.features[1], last)
    points = clouds()
    model.train()
    assert not torch.equal(model(points)[0], model(points)[0])
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match='drop_rate must be in'):
            PointMamba(SMALL, drop_rate=wrong)


@pytest.mark.gpu(nvidia=True)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('order', ['hilbert', 'axes'])
def test_blocks_are_ops_on_a_gpu(order, dtype, monkeypatch):
    """In training all but the first one each, in inference all together, with the numbers and the
    gradients of the CPU."""
    arch = dict(SMALL if order == 'hilbert' else dict(AXES, num_groups=12, group_size=6),
                embed_dims=40, depth=3)
    torch.manual_seed(0)
    model = PointMamba(arch, out_type='raw').eval()
    for block in model.blocks:  # whose mixers give next to nothing at first
        for p in (block.mixer.in_proj.weight, block.mixer.out_proj.weight,
                  block.mixer.x_proj.weight, *block.norm.parameters()):
            torch.nn.init.uniform_(p, -0.3, 0.3)
    points, calls, results = clouds(2), [], {}
    train, infer = mamba_blocks.mamba_block, mamba_blocks.mamba_blocks
    monkeypatch.setattr(mamba_blocks, 'mamba_block', lambda *args: calls.append(1) or train(*args))
    monkeypatch.setattr(mamba_blocks, 'mamba_blocks',
                        lambda *args: calls.append(len(args[2])) or infer(*args))
    for device in ('cpu', 'cuda'):
        net = copy.deepcopy(model).to(device)
        with torch.autocast(device, dtype, enabled=device == 'cuda' and dtype != torch.float32):
            groups = net.group(points.to(device))
            tokens = net.embed(groups, net.orders(groups.centres))
            with torch.no_grad():
                if device == 'cuda':
                    assert mamba_blocks.why_not_one_op(net.blocks, tokens) is None
                inferred, = net.run(tokens, (2,))
            y, = net.run(tokens, (2,))
        # Scaled, as small gradients are 0 in fp16.
        upstream = 4096 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (y.float() * upstream.to(device)).sum().backward()
        results[device] = dict(inferred=inferred, trained=y) | {
            name: p.grad for name, p in net.blocks.named_parameters()}
    assert calls == [3, 1, 1]
    limit = {torch.float16: 3e-2, torch.bfloat16: 0.1, torch.float32: 1e-3}[dtype]
    for name, expected in results['cpu'].items():
        assert relative_error(results['cuda'][name].cpu(), expected) < limit, name


def test_channels_after_the_coordinates_begin_without_an_effect(tmp_path):
    source, points = PointMamba(SMALL).eval(), clouds()
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    model = PointMamba(SMALL, in_channels=6).eval()
    with pytest.raises(UserError, match='adapt_in_channels=True'):
        model.load_pretrained(str(tmp_path / 'a.pth'))
    model.load_pretrained(str(tmp_path / 'a.pth'), adapt_in_channels=True)
    torch.testing.assert_close(model(torch.cat([points, torch.randn_like(points)], 2)),
                               source(points))
    torch.save(model.state_dict(), tmp_path / 'b.pth')
    back = PointMamba(SMALL).eval()
    back.load_pretrained(str(tmp_path / 'b.pth'), adapt_in_channels=True)
    torch.testing.assert_close(back(points), source(points))
    with pytest.raises(ValueError, match='in_channels must be an int of at least 3'):
        PointMamba(SMALL, in_channels=2)


@pytest.mark.parametrize('points, message', [
    (torch.randn(2, 11, 3), r'a cloud of 11 points is too small: 12 groups of 6'),
    (torch.randn(2, 60, 2), r'takes clouds \(B, N, 3\), got \(2, 60, 2\)'),
    (torch.randn(60, 3), r'takes clouds \(B, N, 3\), got \(60, 3\)')])
def test_bad_clouds_are_one_line(points, message):
    with pytest.raises(UserError, match=message) as error:
        PointMamba(SMALL)(points)
    assert '\n' not in str(error.value)


@ORDERS
def test_what_is_no_number_gives_none(arch):
    """A model alone looks at no value; a preprocessor does."""
    points = clouds(2)
    expected, = PointMamba(arch).eval()(points)
    points[0, 7, 1] = torch.nan
    found, = PointMamba(arch).eval()(points)
    assert found[0].isnan().any() and found[1].isfinite().all() and expected.isfinite().all()


def test_duplicates_are_no_error():
    """All points in one place, and a few places for many groups."""
    model = PointMamba(SMALL).eval()
    same, = model(torch.ones(1, 20, 3))
    few, = model(clouds(1, 5).repeat(1, 4, 1))
    assert same.isfinite().all() and few.isfinite().all()
    torch.testing.assert_close(same[..., 0], model(torch.ones(1, 99, 3))[0][..., 0])


# --- heads ------------------------------------------------------------------------------------

def test_pools_of_the_classifier():
    tokens = torch.randn(4, 10, 8)
    for pool, wanted in (('avg', tokens.mean(1)), ('max', tokens.amax(1)),
                         ('avg+max', torch.cat([tokens.mean(1), tokens.amax(1)], 1)),
                         ('cls+avg', torch.cat([tokens[:, -1], tokens.mean(1)], 1))):
        head = PointHead(8, 5, pool).eval()
        torch.testing.assert_close(head(tokens), head.fc(head.layers(wanted)))
    with pytest.raises(ValueError, match="pool='mean'.*'avg', 'max'"):
        PointHead(8, 5, 'mean')
    with pytest.raises(ValueError, match="needs out_type='raw'"):
        PointClassifier(PointMamba(SMALL), PointHead(8, 5))


def test_parts_do_not_depend_on_the_order_of_points():
    points, categories = clouds(2), torch.tensor([0, 3])
    for arch in (SMALL, dict(AXES, num_groups=12, group_size=6)):
        for num_neighbors in (1, 3):
            model = part_model(arch, num_neighbors=num_neighbors).eval()
            logits = model(points, categories)
            assert logits.shape == (2, 60, 9)
            mixed = torch.tensor([0, *(1 + torch.randperm(59)).tolist()])
            torch.testing.assert_close(model(points[:, mixed], categories), logits[:, mixed],
                                       rtol=1e-3, atol=1e-4)
            assert (model(points, categories.flip(0)) - logits).abs().max() > 1e-4
            one_hot = torch.nn.functional.one_hot(categories, 4)
            assert torch.equal(model(points, one_hot), logits)
    with pytest.raises(UserError, match='needs the category'):
        model(points)


def test_points_and_their_parts_are_sampled_together():
    """By the pipeline: a preprocessor has the points alone."""
    with pytest.raises(ValueError, match=r'num_points=20 would .* by SamplePoints\(num=20\)'):
        PointSegmentor(PointMamba(SMALL, (0, 2), 'raw'), PartSegHead([8, 8], 9, 4),
                       dict(num_points=20))


def test_views_are_averaged():
    model = PointClassifier(PointMamba(SMALL, out_type='raw'), PointHead(8, 5)).eval()
    views = torch.stack([clouds(2), clouds(2) * 1.3], 1)
    both = model(views, mode='predict')
    wanted = ((model(views[:, 0]) + model(views[:, 1])) / 2).softmax(1)
    torch.testing.assert_close(torch.stack([s.pred_score for s in both]), wanted)
    assert [s.pred_label.item() for s in both] == wanted.argmax(1).tolist()
    with pytest.raises(ValueError, match="mode='test'.*'tensor', 'loss', 'predict'"):
        model(views, mode='test')


def test_preprocessor():
    torch.manual_seed(0)
    points = torch.randn(3, 50, 4)
    same = PointPreprocessor()(dict(inputs=list(points)))
    assert torch.equal(same['inputs'], points) and same['data_samples'] is None
    fewer = PointPreprocessor(num_points=20)(dict(inputs=points))['inputs']
    assert fewer.shape == (3, 20, 4) and torch.equal(fewer[:, 0], points[:, 0])
    kinds = PointPreprocessor(20, pool=30, votes=3, augments=[dict(type='rotate')])
    trained = kinds(dict(inputs=points), training=True)['inputs']
    assert trained.shape == (3, 20, 4)
    norms = {round(x, 3) for x in points[0, :, :3].norm(dim=1).tolist()}
    assert {round(x, 3) for x in trained[0, :, :3].norm(dim=1).tolist()} <= norms
    assert kinds(dict(inputs=points))['inputs'].shape == (3, 3, 20, 4)
    for given, message in (
            ([points[0], points[1, :40]], 'must have as many points each, got 50, 40'),
            (points[:, :10], 'a cloud has 10 points, and 20 are to be sampled'),
            (points / 0, 'NaN or infinite')):
        with pytest.raises(UserError, match=message):
            PointPreprocessor(num_points=20)(dict(inputs=given))
    for wrong, message in ((dict(num_points=9, pool=8), 'pool=8 must be at least num_points=9'),
                           (dict(augments=[dict(type='flip')]), "type='flip'.*'scale_shift'")):
        with pytest.raises(ValueError, match=message):
            PointPreprocessor(**wrong)


# --- the pre-training -----------------------------------------------------------------------------

@ORDERS
@pytest.mark.parametrize('mask_type', ['rand', 'block'])
def test_masked_pretraining(arch, mask_type):
    backbone = PointMamba(arch, out_type='raw', drop_path_rate=0.1)
    if arch.get('cls_token'):
        with pytest.raises(ValueError, match='class token'):
            MaskedPointMamba(backbone)
        return
    torch.manual_seed(0)
    model = MaskedPointMamba(backbone, 2, 0.1, mask_type=mask_type)
    loss = model(clouds(), mode='loss')['loss']
    loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert not still
    rebuilt = model.eval().rebuild(clouds())
    assert rebuilt.points.shape == rebuilt.wanted.shape == (3, 7, 6, 3)
    assert rebuilt.visible.shape == (3, 5, 8) and (rebuilt.mask.sum(1) == 7).all()
    # Each masked group is what the cloud has there.
    points = rebuilt.wanted + rebuilt.centres.unsqueeze(2)
    distances = torch.cdist(points.flatten(1, 2).double(), clouds().double()).amin(2)
    assert distances.max() < 1e-6
    sample, *_ = model(clouds(), mode='predict')
    assert sample.pred_points.shape == sample.masked_points.shape == (42, 3)


def test_a_block_is_masked_around_one_group():
    model = MaskedPointMamba(PointMamba(SMALL, out_type='raw'), 1, mask_type='block')
    centres = torch.linspace(0, 1, 12).view(1, 12, 1).expand(1, 12, 3)
    for _ in range(5):
        where = model.draw_mask(centres)[0].nonzero().flatten()
        assert len(where) == 7 and where[-1] - where[0] == 6


def test_wrong_pretraining_names_the_choices():
    backbone = PointMamba(SMALL, out_type='raw')
    for wrong, message in ((dict(mask_type='half'), "mask_type='half'.*'rand', 'block'"),
                           (dict(loss='emd'), "'cdl1' or 'cdl2'"),
                           (dict(mask_ratio=1.0), 'leave and take some of 12 groups')):
        with pytest.raises(ValueError, match=message):
            MaskedPointMamba(backbone, **wrong)


@pytest.mark.parametrize('arch', [HILBERT, AXES], ids=['hilbert', 'axes'])
def test_files_of_the_pretraining(arch, tmp_path):
    """The whole of it, and its encoder alone into a backbone."""
    from families.pointmamba import official_name

    model = MaskedPointMamba(PointMamba(arch, out_type='raw'), 1)
    state = {}
    for name, value in model.state_dict().items():
        top, _, rest = name.partition('.')
        if top == 'backbone':
            name = f'MAE_encoder.{official_name(rest)}'
        elif top == 'decoder':
            part = rest.partition('.')[0]
            place = {'blocks': 'MAE_decoder.blocks.layers.', 'norm_f': 'MAE_decoder.blocks.norm_f.',
                     'norm': 'MAE_decoder.norm.', 'pos_embed': 'decoder_pos_embed.',
                     'points': 'increase_dim.0.'}[part]
            name = place + rest.partition('.')[2]
        state[name] = value
    again = MaskedPointMamba(PointMamba(arch, out_type='raw'), 1)
    again.load_state_dict(state)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    content = dict(base_model={f'module.{k}': v for k, v in state.items()}, epoch=3, metrics={})
    torch.save(content, tmp_path / 'pretrain.pth')
    for prefix in (None, 'backbone.'):
        backbone = PointMamba(arch)
        backbone.load_pretrained(str(tmp_path / 'pretrain.pth'), prefix=prefix)
        assert all(torch.equal(v, model.backbone.state_dict()[k])
                   for k, v in backbone.state_dict().items())


def test_released_classifiers_come_under_our_names():
    from vmamba_mm.checkpoints.files import read_checkpoint

    read = read_checkpoint(shared('parity/pointmamba/cls_xyz.pth'))
    assert read['meta']['task'] == 'cls' and read['meta']['arch']['order'] == 'axes'
    assert {'head.layers.0.weight', 'head.fc.bias', 'backbone.norm.bias'} <= set(read['state_dict'])
