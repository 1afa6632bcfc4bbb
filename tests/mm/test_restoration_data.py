"""Restoration: image files, data sets, what degrades images, a run with EMA, predictions."""

import copy

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from vmamba_mm.errors import UserError
from vmamba_mm.mm.restoration import images
from vmamba_mm.mm.restoration.metrics import RestorationMetric, compare
from vmamba_mm.mm.restoration.models import ImageRestorer
from vmamba_mm.mm.restoration.predict import restore_file

cv2 = pytest.importorskip('cv2')
SMALL = dict(base='light_x2', embed_dims=30, depths=(1,), d_state=1)
DENOISE = dict(base='denoise', embed_dims=30, depths=(1,), d_state=1)


def write(path, *shape, dtype=np.uint8, seed=0):
    """A random image file, in OpenCV's order of channels."""
    one = np.iinfo(dtype).max
    image = np.random.default_rng(seed).integers(0, one + 1, shape).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image


def build(kind, **kwargs):
    from vmamba_mm.registry import TRANSFORMS

    return TRANSFORMS.build(dict(type=f'vmamba_mm.{kind}', **kwargs))


def dataset(root, steps=(), **kwargs):
    from vmamba_mm.registry import DATASETS

    return DATASETS.build(dict(type='vmamba_mm.RestorationDataset', data_root=str(root),
                               pipeline=list(steps), **kwargs))


# --- files --------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape, dtype', [
    ((5, 6), np.uint8), ((5, 6, 3), np.uint8), ((5, 6, 4), np.uint8), ((5, 6), np.uint16),
    ((5, 6, 3), np.uint16), ((5, 6, 4), np.uint16)])
def test_files_come_back_as_they_were(shape, dtype, tmp_path):
    from PIL import Image

    stored = write(tmp_path / 'a.png', *shape, dtype=dtype)
    read = images.read_image(tmp_path / 'a.png')
    assert read.dtype == dtype and read.values.shape == (5, 6, 1 if len(shape) == 2 else 3)
    assert (read.alpha is not None) == (shape[-1] == 4)
    if len(shape) == 3:  # RGB
        assert read.values[0, 0, 0] == pytest.approx(stored[0, 0, 2] / np.iinfo(dtype).max)
    (tmp_path / 'b.png').write_bytes(images.encode_png(read, ('Made from', 'ä b')))
    assert np.array_equal(cv2.imread(str(tmp_path / 'b.png'), cv2.IMREAD_UNCHANGED), stored)
    with Image.open(tmp_path / 'b.png') as opened:
        opened.load()
        assert opened.info['Made from'] == 'ä b'


def test_grey_with_alpha_and_photographs_that_lie_on_their_side(tmp_path):
    from PIL import Image

    pixels = np.zeros((4, 6, 2), np.uint8)
    pixels[..., 0], pixels[..., 1] = 100, 50
    Image.fromarray(pixels, 'LA').save(tmp_path / 'a.png')
    read = images.read_image(tmp_path / 'a.png')
    assert read.values.shape == (4, 6, 1) and set(np.unique((read.values * 255).round())) == {100}
    assert read.alpha.shape == (4, 6, 1) and set(np.unique((read.alpha * 255).round())) == {50}
    model = restorer(DENOISE, backbone=dict(in_channels=1))  # takes it, as it is grey
    assert restore_file(model, tmp_path / 'a.png', tmp_path / 'b.png').endswith(
        'grey, with alpha')
    found = cv2.imread(str(tmp_path / 'b.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(found[..., 0], found[..., 2]) and (found[..., 3] == 50).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (8, 4)).save(tmp_path / 'a.jpg', exif=exif)
    assert images.read_image(tmp_path / 'a.jpg').values.shape == (8, 4, 3)


@pytest.mark.parametrize('content, message', [
    (b'', 'is empty'), (b'no image', 'is corrupt, or no image'),
    (None, r'cannot be read \(No such file')])
def test_files_that_are_no_images(content, message, tmp_path):
    path = tmp_path / 'a.png'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f'{path}.*{message}'):
        images.read_image(path)


def test_values_that_are_no_integers(tmp_path):
    assert cv2.imwrite(str(tmp_path / 'a.tiff'), np.zeros((4, 4, 3), np.float32))
    with pytest.raises(UserError, match='3 channel.* of float32; .* 8 or 16 bits'):
        images.read_image(tmp_path / 'a.tiff')


def test_bicubic_by_hand():
    """At half the size, the eight weights of MATLAB's imresize, and its mirrored border."""
    row = np.random.default_rng(0).random((1, 12, 1))
    found = images.resize(row, (1, 6))[0, :, 0]
    x = np.arange(8) - 3.5  # in the small image's pixels half as far
    x = np.abs(x) / 2
    weights = np.where(x <= 1, 1.5 * x ** 3 - 2.5 * x ** 2 + 1,
                       -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2)
    weights /= weights.sum()
    padded = np.concatenate([row[0, 2::-1, 0], row[0, :, 0], row[0, :-4:-1, 0]])
    assert found == pytest.approx([(weights * padded[2 * i:2 * i + 8]).sum() for i in range(6)])
    ramp = np.arange(20.0)[:, None, None] * np.ones((1, 3, 2))
    larger = images.resize(ramp, (40, 3))
    assert larger[8:-8, 1, 1] == pytest.approx((np.arange(8, 32) + 0.5) / 2 - 0.5, abs=1e-5)
    assert images.resize(ramp, (20, 3)) == pytest.approx(ramp)


# --- data sets ------------------------------------------------------------------------------------

def test_pairs_of_two_folders(tmp_path):
    for folder in ('DIV2K', 'Flickr2K'):
        for i in range(2):
            write(tmp_path / folder / 'HR' / f'{i}.png', 8, 8, 3)
            write(tmp_path / folder / 'LR' / 'X2' / f'{i}x2.png', 4, 4, 3)
    data = dataset(tmp_path, gt=['DIV2K/HR', 'Flickr2K/HR'], lq=['DIV2K/LR/X2', 'Flickr2K/LR/X2'],
                   lq_name='{}x2')
    pairs = [(info['gt_path'], info['lq_path']) for info in data.load_data_list()]
    assert [tuple(p.removeprefix(f'{tmp_path}/') for p in pair) for pair in pairs] == [
        (f'{folder}/HR/{i}.png', f'{folder}/LR/X2/{i}x2.png')
        for folder in ('DIV2K', 'Flickr2K') for i in range(2)]
    alone = dataset(tmp_path, gt='DIV2K')  # folders in it
    assert len(alone.load_data_list()) == 4 and 'lq_path' not in alone.load_data_list()[0]


def test_what_is_missing_is_one_line(tmp_path):
    write(tmp_path / 'HR/a.png', 8, 8, 3)
    write(tmp_path / 'LR/b.png', 4, 4, 3)
    (tmp_path / 'none').mkdir()
    for kwargs, message in (
            (dict(gt='nowhere'), 'nowhere of images does not exist: put it there'),
            (dict(gt='none'), 'none has no images'),
            (dict(gt='HR', lq='LR'), r'HR/a.png has no degraded image .*LR/a\.\*: put it there')):
        with pytest.raises(UserError, match=message) as caught:
            dataset(tmp_path, **kwargs)
        assert '\n' not in str(caught.value)
    for kwargs, message in ((dict(gt=['HR', 'none'], lq=['LR']), 'lq one for each'),
                            (dict(gt='HR', lq_name='x2'), "lq_name must be such as '{}x2'")):
        with pytest.raises(ValueError, match=message):
            dataset(tmp_path, **kwargs)


# --- steps ----------------------------------------------------------------------------------------

def test_patches_lie_on_one_another():
    place = np.mgrid[:12, :10].transpose(1, 2, 0).astype(np.float32)
    pair = dict(gt=place.repeat(2, 0).repeat(2, 1), lq=place)
    seen = set()
    np.random.seed(0)
    for _ in range(60):
        found = build('PatchOfPair', size=4, scale=2)(pair)
        assert found['gt'].shape == (4, 4, 2) and found['lq'].shape == (2, 2, 2)
        turned = build('TurnPair')(found)
        assert np.array_equal(turned['gt'][::2, ::2], turned['lq'])
        seen.add(turned['lq'].tobytes())
    assert len(seen) > 40
    with pytest.raises(UserError, match='a.png has 20x24 pixels, .*smaller than the patches of 32'):
        build('PatchOfPair', size=32)(dict(pair, gt_path='a.png'))


def test_all_eight_poses_come():
    image = np.arange(4.0).reshape(2, 2, 1)
    assert len({build('TurnPair')(dict(gt=image))['gt'].tobytes() for _ in range(300)}) == 8


def test_noise():
    gt = np.full((50, 60, 3), 0.5, np.float32)
    step = build('AddNoise', sigma=25, seed=0)
    found = step(dict(gt=gt))['lq']
    assert np.array_equal(step(dict(gt=gt))['lq'], found)  # drawn anew for each image
    np.random.seed(0)  # as the public code draws it, in blue, green and red
    expected = gt[..., ::-1] + np.random.normal(0, 25 / 255, gt.shape)
    assert found[..., ::-1] == pytest.approx(expected, abs=1e-6)
    free = build('AddNoise', sigma=25)
    assert not np.array_equal(free(dict(gt=gt))['lq'], free(dict(gt=gt))['lq'])


def test_jpeg_and_downscaling():
    x = np.linspace(0, 1, 32, dtype=np.float32)
    grey = (0.5 + 0.5 * np.sin(20 * x[:, None] * x))[..., None].astype(np.float32)
    errors = [np.abs(build('CompressJPEG', quality=q)(dict(gt=grey))['lq'] - grey).mean()
              for q in (10, 40, 95)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    colour = np.stack([grey[..., 0], 0.2 * grey[..., 0], 0.9 - 0.5 * grey[..., 0]], 2)
    found = build('CompressJPEG', quality=95)(dict(gt=colour))['lq']
    assert np.abs(found - colour).mean() < 0.05  # red is still red
    small = build('Downscale', scale=4)(dict(gt=colour))['lq']
    assert small.shape == (8, 8, 3) and small == pytest.approx((small * 255).round() / 255)


def test_loading_brings_images_together(tmp_path):
    write(tmp_path / 'gt.png', 9, 11)
    write(tmp_path / 'lq.png', 4, 5, 3)
    info = dict(gt_path=str(tmp_path / 'gt.png'), lq_path=str(tmp_path / 'lq.png'))
    pair = build('LoadPair', scale=2)(info)
    assert pair['gt'].shape == (8, 10, 3) and pair['lq'].shape == (4, 5, 3)
    assert np.array_equal(pair['gt'][..., 0], pair['gt'][..., 2])
    grey = build('LoadPair', colour='grey')(dict(gt_path=info['lq_path']))['gt']
    stored = cv2.cvtColor(cv2.imread(info['lq_path']), cv2.COLOR_BGR2GRAY)
    assert grey.shape == (4, 5, 1) and np.abs(grey[..., 0] * 255 - stored).max() <= 0.51
    packed = build('PackPair')(pair)
    assert packed['inputs'].shape == (3, 4, 5) and packed['data_samples'].gt.shape == (3, 8, 10)
    assert packed['data_samples'].gt_path == info['gt_path']
    with pytest.raises(UserError, match='lq.png has 5x4 pixels.*gt.png 9x9, which is not 3 times'):
        build('LoadPair', scale=3)(info)
    with pytest.raises(UserError, match='11x9 pixels, and is smaller than the scale, 16'):
        build('LoadPair', scale=16)(info)
    with pytest.raises(UserError, match='has no degraded image: name lq='):
        build('PackPair')(dict(gt=pair['gt'], gt_path='a.png'))


@pytest.mark.parametrize('kind, kwargs, message', [
    ('LoadPair', dict(colour='bgr'), "'bgr' does not exist; choose one of"),
    ('LoadPair', dict(scale=0), 'scale must be an int of at least 1'),
    ('PatchOfPair', dict(size=5, scale=2), 'multiple of scale=2, got 5'),
    ('AddNoise', dict(sigma=-1), 'sigma must be at least 0'),
    ('CompressJPEG', dict(quality=0), 'from 1 to 100')])
def test_wrong_arguments_of_steps(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **kwargs)


# --- hooks ----------------------------------------------------------------------------------------

class _At:
    def __init__(self, iteration):
        self.iter = iteration


def pairs(count, size, scale=1):
    rng = torch.Generator().manual_seed(0)
    lq = [torch.rand(3, size, size, generator=rng) for _ in range(count)]
    return dict(inputs=lq, data_samples=[BaseDataElement(gt=x.repeat_interleave(
        scale, 1).repeat_interleave(scale, 2)) for x in lq])


def test_patches_grow_and_batches_shrink():
    from vmamba_mm.mm.hooks import ProgressivePatches

    hook = ProgressivePatches([2, 3], [4, 1], [4, 8], scale=2)
    for iteration, count, size in ((0, 4, 4), (1, 4, 4), (2, 1, 8), (4, 1, 8), (99, 1, 8)):
        batch = pairs(4, 6, 2)
        hook.before_train_iter(_At(iteration), 0, batch)
        assert len(batch['inputs']) == len(batch['data_samples']) == count
        for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
            assert sample.gt.shape == (3, size, size)
            assert torch.equal(sample.gt[:, ::2, ::2], image)
    with pytest.raises(ValueError, match='an entry for each step'):
        ProgressivePatches([2], [4, 1], [4, 8])


def test_mixed_pairs_are_mixed_alike():
    from vmamba_mm.mm.hooks import MixPairs

    np.random.seed(1)
    before, batch = pairs(4, 3), pairs(4, 3)
    MixPairs(1.2).before_train_iter(_At(0), 0, batch)
    for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
        torch.testing.assert_close(sample.gt, image)
    torch.testing.assert_close(sum(batch['inputs']), sum(before['inputs']))
    assert not torch.equal(batch['inputs'][0], before['inputs'][0])
    with pytest.raises(ValueError, match='beta must be above 0'):
        MixPairs(0)


def test_some_batches_are_not_mixed():
    from vmamba_mm.mm.hooks import MixPairs

    np.random.seed(0)
    hook, before, kept = MixPairs(1.2, prob=0.3), pairs(4, 3), 0
    for _ in range(100):
        batch = pairs(4, 3)
        hook.before_train_iter(_At(0), 0, batch)
        kept += all(map(torch.equal, batch['inputs'], before['inputs']))
    assert 55 < kept < 90  # a permutation may change nothing either
    with pytest.raises(ValueError, match=r'prob must be in \[0, 1\], got 2'):
        MixPairs(1.2, 2)


# --- the model ------------------------------------------------------------------------------------

def restorer(arch=SMALL, kind='MambaIR', seed=0, **kwargs):
    torch.manual_seed(seed)
    backbone = dict(type=f'vmamba_mm.{kind}', arch=arch, **kwargs.pop('backbone', {}))
    return ImageRestorer(backbone, **kwargs).eval()


def test_losses_by_hand():
    batch = pairs(2, 6, 2)
    for loss in ('l1', 'charbonnier'):
        model = restorer(loss=loss)
        x = torch.stack(batch['inputs'])
        error = model(x) - torch.stack([s.gt for s in batch['data_samples']])
        expected = error.abs() if loss == 'l1' else (error ** 2 + 1e-3).sqrt()
        found = model(x, batch['data_samples'], mode='loss')['loss']
        torch.testing.assert_close(found, expected.mean())


def test_predictions_are_tiled_and_averaged():
    x = torch.rand(1, 3, 20, 30)
    model = restorer(test_cfg=dict(tile=0))
    expected = model.backbone(x).clamp(0, 1)
    sample, = model(x, mode='predict')
    torch.testing.assert_close(sample.pred, expected[0])
    tiled = restorer(test_cfg=dict(tile=12))
    calls = []
    y = tiled.restore(x, lambda *done: calls.append(done))
    assert calls[-1] == (6, 6) and y.shape == (1, 3, 40, 60) and not torch.equal(y, expected)
    averaged = restorer(test_cfg=dict(self_ensemble=True)).restore(x)
    turned = restorer(test_cfg=dict(self_ensemble=True)).restore(x.transpose(2, 3).flip(2))
    torch.testing.assert_close(turned, averaged.transpose(2, 3).flip(2), rtol=1e-4, atol=1e-5)


def test_the_u_net_takes_any_size():
    model = restorer(dict(base='real_denoise', embed_dims=30, depths=(1, 1, 1, 1), d_state=1,
                          refinement_depth=1), 'MambaIRUNet')
    assert model.restore(torch.rand(1, 3, 5, 18)).shape == (1, 3, 5, 18)


@pytest.mark.parametrize('kwargs, message', [
    (dict(loss='l2'), "loss='l2' does not exist; choose one of .'l1', 'charbonnier'."),
    (dict(test_cfg=dict(tiles=3)), "unknown keys .'tiles'."),
    (dict(test_cfg=dict(tile=-1)), 'an int of at least 0, got -1'),
    (dict(test_cfg=dict(self_ensemble=8)), 'must be True or False')])
def test_wrong_arguments_of_the_model(kwargs, message):
    with pytest.raises(ValueError, match=message):
        restorer(**kwargs)


def test_batches_of_several_sizes_are_one_line():
    batch = pairs(2, 6)
    batch['inputs'][1] = batch['inputs'][1][:, :4]
    with pytest.raises(UserError, match='must be of one size, got 6x6, 6x4: cut patches'):
        restorer().data_preprocessor(batch)


def test_start_from_the_weights_for_another_scale(tmp_path):
    """As the published models for x3 and x4 started."""
    two = restorer(dict(base='sr_x2', embed_dims=30, depths=(1,), d_state=1)).backbone
    torch.save(dict(params=two.state_dict()), tmp_path / 'x2.pth')
    three = restorer(dict(two.arch, upscale=3), seed=1).backbone
    before = copy.deepcopy(three.state_dict())
    with pytest.raises(UserError, match='upsample'):
        three.load_pretrained(str(tmp_path / 'x2.pth'))
    three.load_pretrained(str(tmp_path / 'x2.pth'), other_scale=True)
    for key, value in three.state_dict().items():
        expected = before[key] if key.startswith('upsample.') else two.state_dict()[key]
        assert torch.equal(value, expected), key
    wider = restorer(dict(two.arch, embed_dims=32, upscale=3)).backbone
    with pytest.raises(UserError, match='conv_first'):
        wider.load_pretrained(str(tmp_path / 'x2.pth'), other_scale=True)


def test_images_that_cannot_be_measured_are_named():
    metric = RestorationMetric(crop_border=2)
    images = torch.rand(3, 14, 20), torch.rand(3, 14, 21)
    for other, message in ((images[0], 'at least 11x11 pixels'), (images[1], 'cannot be compared')):
        sample = dict(pred=images[0], gt=other, gt_path='HR/a.png')
        with pytest.raises(UserError, match=f'HR/a.png cannot be measured: .*{message}.*leave it'):
            metric.process(None, [sample])


# --- files in, files out --------------------------------------------------------------------------

@pytest.mark.parametrize('shape, dtype, text', [
    ((9, 12, 3), np.uint8, '12x9 to 24x18, 8 bits'),
    ((9, 12, 4), np.uint8, '8 bits, with alpha'), ((9, 12), np.uint8, '8 bits, grey'),
    ((9, 12, 3), np.uint16, '16 bits'), ((9, 12), np.uint16, '16 bits, grey'),
    ((1, 1, 3), np.uint8, '1x1 to 2x2')])
def test_restored_files(shape, dtype, text, tmp_path):
    write(tmp_path / 'a.png', *shape, dtype=dtype)
    model = restorer()
    assert text in restore_file(model, tmp_path / 'a.png', tmp_path / 'b.png')
    found = cv2.imread(str(tmp_path / 'b.png'), cv2.IMREAD_UNCHANGED)
    assert found.dtype == dtype and found.shape == (2 * shape[0], 2 * shape[1], *shape[2:])
    read = images.read_image(tmp_path / 'a.png')
    values = torch.from_numpy(read.values).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
    expected = model.restore(values)[0].permute(1, 2, 0).numpy()
    restored = images.read_image(tmp_path / 'b.png').values
    expected = expected.mean(2, keepdims=True) if restored.shape[2] == 1 else expected
    assert np.abs(restored - expected).max() <= 0.501 / np.iinfo(dtype).max + 1e-6


def test_alpha_of_an_image_that_keeps_its_size_is_untouched(tmp_path):
    stored = write(tmp_path / 'a.png', 9, 12, 4)
    restore_file(restorer(DENOISE), tmp_path / 'a.png', tmp_path / 'b.png')
    found = cv2.imread(str(tmp_path / 'b.png'), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(found[..., 3], stored[..., 3])


def test_colour_is_refused_by_a_model_of_grey(tmp_path):
    write(tmp_path / 'a.png', 9, 12, 3)
    write(tmp_path / 'grey.png', 9, 12)
    model = restorer(DENOISE, backbone=dict(in_channels=1))
    with pytest.raises(UserError, match='a.png is a colour image, and the model restores grey'):
        restore_file(model, tmp_path / 'a.png', tmp_path / 'b.png')
    assert 'grey' in restore_file(model, tmp_path / 'grey.png', tmp_path / 'b.png')


def test_the_metric_is_the_mean_of_8_bit_images():
    from vmamba_mm.registry import METRICS

    metric = METRICS.build(dict(type='vmamba_mm.RestorationMetric', crop_border=2, on_luma=True))
    rng = torch.Generator().manual_seed(0)
    expected = []
    for _ in range(3):
        gt = torch.rand(3, 20, 24, generator=rng)
        pred = gt + 0.05 * torch.randn(gt.shape, generator=rng)
        metric.process({}, [dict(pred=pred, gt=gt)])
        expected.append(compare(pred.clamp(0, 1).mul(255).round(), gt.mul(255).round(), 2, True))
    found = metric.compute_metrics(metric.results)
    assert found == pytest.approx(dict(psnr=sum(p for p, _ in expected) / 3,
                                       ssim=sum(s for _, s in expected) / 3))
    with pytest.raises(ValueError, match='crop_border'):
        METRICS.build(dict(type='vmamba_mm.RestorationMetric', crop_border=-1))
