"""RS-Mamba in mmseg: pairs of images, masks of one class, training and evaluation of the configs,
and the tools on pairs."""

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba_mm.errors import UserError
from vmamba_mm.heads import DiceLoss, RemoteSensingModel
from vmamba_mm.registry import MODELS, TRANSFORMS

SMALL = dict(base='tiny', embed_dims=8, depths=(1, 1, 1, 1), d_state=2)
DIMS = [8, 16, 32, 64]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Three noisy pairs of 80x96 with a bright square more in the second image, and their masks;
    the second images are those of segmentation as well."""
    root = tmp_path_factory.mktemp('pairs')
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for i in range(3):
            before = rng.integers(40, 90, (80, 96, 3), dtype=np.uint8)
            after, mask = before.copy(), np.zeros((80, 96), np.uint8)
            y, x = 8 * i, 16 * i
            after[y:y + 30, x:x + 30], mask[y:y + 30, x:x + 30] = 230, 255
            for folder, pixels in (('A', before), ('B', after), ('label', mask), ('image', after)):
                save(root / split / folder / f'{i}.png', pixels)
    return root


def options(config, root):
    """Of a small model on the data."""
    nested = ('train_dataloader.dataset.dataset', 'val_dataloader.dataset',
              'test_dataloader.dataset')
    return {'model.decode_head.in_channels': DIMS,
            **({'model.neck.in_channels': DIMS} if '-cd-' in config else {}),
            **{f'{place}.data_root': str(root) for place in nested},
            **{f'{loader}_dataloader.{key}': value for loader in ('train', 'val', 'test')
               for key, value in (('num_workers', 0), ('persistent_workers', False))},
            'crop_size': (64, 64), 'model.test_cfg.crop_size': (64, 64),
            'model.test_cfg.stride': (32, 32), 'model.data_preprocessor.size': (64, 64),
            'train_dataloader.dataset.times': 1, 'train_dataloader.batch_size': 3,
            'optim_wrapper.type': 'OptimWrapper', 'train_cfg.max_epochs': 2,
            'train_cfg.val_begin': 2, 'train_cfg.val_interval': 1,
            'param_scheduler.0.end': 2}


def load(config, root, more=()):
    from vmamba_mm.mm import cli

    cfg = cli.load_config(f'configs/rs_mamba/{config}.py', {})
    for key in ('dtype', 'loss_scale'):
        cfg.optim_wrapper.pop(key)
    cfg.model.backbone.arch = SMALL
    cfg.merge_from_dict({**options(config, root), **dict(more)})
    for step in cfg.train_dataloader.dataset.dataset.pipeline:
        if step['type'] == 'RandomCrop':
            step['crop_size'] = (64, 64)
    return cfg


CONFIGS = ('rsm-cd-tiny_1xb32-300e_levir-cd-256x256', 'rsm-cd-tiny_1xb32-300e_whu-cd-256x256',
           'rsm-ss-tiny_1xb32-300e_massachusetts-roads-256x256',
           'rsm-ss-tiny_1xb32-300e_whu-building-256x256')


@pytest.mark.parametrize('config', CONFIGS)
def test_trains_and_evaluates(config, data, tmp_path):
    """Two epochs; the learning rate of the schedule by F1; the four numbers of the class."""
    from mmengine.runner import Runner

    cfg = load(config, data, dict(work_dir=str(tmp_path)))
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.named_parameters()}
    runner.train()
    assert all(not torch.equal(v, before[k]) for k, v in runner.model.named_parameters()
               if v.requires_grad and v.grad is not None and v.grad.any())
    metrics = runner.test()
    assert set(metrics) == {'Precision', 'Recall', 'F1', 'IoU'}
    f1, iou = metrics['F1'] / 100, metrics['IoU'] / 100
    assert 0 <= iou <= f1 <= 1 and abs(iou - f1 / (2 - f1)) < 1e-6
    assert list(tmp_path.glob('best_F1*.pth'))
    # The plain model has the same names, and so the same numbers.
    model = RemoteSensingModel(SMALL, num_images=2 if '-cd-' in config else 1).eval()
    model.load_state_dict(runner.model.state_dict())
    x = torch.randn(1, 6 if '-cd-' in config else 3, 64, 64)
    assert torch.equal(model(x), runner.model.eval()._forward(x))


def test_published_loss():
    """Cross-entropy and one Dice number for the whole batch, as the public code has them."""
    from vmamba_mm.mm import cli

    torch.manual_seed(0)
    logits, labels = torch.randn(3, 1, 5, 4, dtype=torch.float64), torch.randint(0, 2, (3, 5, 4))
    p, t = logits[:, 0].sigmoid(), labels.double()
    expected = 1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
    cfg = cli.load_config(f'configs/rs_mamba/{CONFIGS[0]}.py', {})
    loss = MODELS.build(cfg.model.decode_head.loss_decode[1])
    assert isinstance(loss, DiceLoss)
    torch.testing.assert_close(loss(logits, labels), expected.float())
    ignored = labels.clone()
    ignored[1] = 255
    torch.testing.assert_close(loss(logits, ignored), loss(logits[[0, 2]], labels[[0, 2]]))


def test_dates_go_through_one_encoder():
    """Each date gives what it gives alone, and the order of the two is that of the channels."""
    torch.manual_seed(0)
    pair, single = (RemoteSensingModel(SMALL, num_images=n).backbone.eval() for n in (2, 1))
    single.load_state_dict(pair.state_dict())
    first, second = torch.randn(2, 2, 3, 40, 33)
    for both, one, two in zip(pair(torch.cat((first, second), 1)), single(first), single(second),
                              strict=True):
        torch.testing.assert_close(both, torch.cat((one, two), 1))
    with pytest.raises(ValueError, match='2 images of 3 channel.* has 3'):
        pair(first)
    with pytest.raises(ValueError, match='num_images must be an int of at least 1'):
        RemoteSensingModel(SMALL, num_images=0)


def build(type_, **kwargs):
    return TRANSFORMS.build(dict(type=f'vmamba_mm.{type_}', **kwargs))


def test_pairs_and_masks(data):
    names = dict(img_path=str(data / 'train/A/0.png'), img_path2=str(data / 'train/B/0.png'),
                 seg_map_path=str(data / 'train/label/0.png'), seg_fields=[])
    results = build('LoadBinaryAnnotations')(build('LoadImagePair')(names))
    assert results['img'].shape == results['img2'].shape == (80, 96, 3)
    assert results['img_shape'] == results['ori_shape'] == (80, 96)
    assert np.array_equal(results['gt_seg_map'], (results['img2'] != results['img']).any(-1))
    swapped = build('SwapImages', prob=1)(dict(results))
    assert np.array_equal(swapped['img'], results['img2']) and np.array_equal(
        swapped['img2'], results['img'])
    turned = build('RandomTranspose', prob=1)(dict(results))
    assert np.array_equal(turned['gt_seg_map'], results['gt_seg_map'].T)
    assert np.array_equal(turned['img'], results['img'].swapaxes(0, 1))
    assert turned['img_shape'] == (96, 80)
    for name in ('SwapImages', 'RandomTranspose'):
        assert np.array_equal(build(name, prob=0)(dict(results))['img'], results['img'])
        with pytest.raises(ValueError, match='prob must be from 0 to 1, got 2'):
            build(name, prob=2)


def test_bad_pairs(data, tmp_path):
    good = str(data / 'train/A/0.png')
    small = str(save(tmp_path / 'small.png', np.zeros((40, 96, 3), np.uint8)))
    text = tmp_path / 'text.png'
    text.write_text('no image')
    for second, message in (
            (small, f'must have one size: {good} has 96x80 pixels and {small} 96x40'),
            (str(text), f'the image {text} is corrupt, or no image'),
            (str(tmp_path / 'absent.png'), 'absent.png cannot be read: No such file'),
            (None, f'two images, and there is only {good}: give the second')):
        with pytest.raises(UserError, match=message.replace('(', '.')):
            build('LoadImagePair')(dict(img_path=good, img_path2=second))


@pytest.mark.parametrize('threshold, values, expected', [
    (1, [0, 255, 254, 3], [0, 1, 1, 1]), (128, [0, 255, 254, 3], [0, 1, 1, 0]),
    (1, [0, 1, 1, 0], [0, 1, 1, 0]), (128, [0, 1, 1, 0], [0, 1, 1, 0]), (128, [0] * 4, [0] * 4)])
@pytest.mark.parametrize('channels', [0, 2, 3, 4])
def test_values_of_masks(tmp_path, threshold, values, expected, channels):
    """Grey and coloured, with an alpha channel or without; read after the image was resized."""
    pixels = np.array([values], np.uint8)
    if channels:
        pixels = np.stack([pixels] * (channels - 1) + [
            np.full_like(pixels, 255) if channels in (2, 4) else pixels], -1)
    path = str(save(tmp_path / 'mask.png', pixels))
    image = dict(img=np.zeros((8, 8, 3), np.uint8), ori_shape=(1, 4), img_path='a.png')
    found = build('LoadBinaryAnnotations', threshold=threshold)(dict(image, seg_map_path=path))
    assert found['gt_seg_map'].dtype == np.uint8 and found['gt_seg_map'].tolist() == [expected]


def test_threshold_of_masks():
    with pytest.raises(ValueError, match='threshold must be from 1 to 255, got 0'):
        build('LoadBinaryAnnotations', threshold=0)


def test_mask_of_another_size(data, tmp_path):
    mask = str(save(tmp_path / 'mask.png', np.zeros((40, 96), np.uint8)))
    image = str(data / 'train/A/0.png')
    loaded = build('LoadImagePair')(dict(img_path=image, img_path2=image, seg_map_path=mask))
    with pytest.raises(UserError, match=f'{mask} has 96x40 pixels and its image {image} 96x80'):
        build('LoadBinaryAnnotations')(loaded)


def test_metric_counts_the_class():
    """By hand, and 0 where nothing was found or labelled."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from vmamba_mm.registry import METRICS

    def evaluate(found, labels):
        metric = METRICS.build(dict(type='vmamba_mm.ForegroundMetric'))
        metric.dataset_meta = dict(classes=('background', 'change'))
        sample = SegDataSample(pred_sem_seg=PixelData(data=torch.tensor([found])),
                               gt_sem_seg=PixelData(data=torch.tensor([labels])))
        metric.process({}, [sample.to_dict()])
        return {k: round(v, 3) for k, v in metric.evaluate(1).items()}

    found = evaluate([[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 1], [255, 0, 0, 0]])
    assert found == dict(Precision=33.333, Recall=50.0, F1=40.0, IoU=25.0)
    nothing = dict(Precision=0, Recall=0, F1=0, IoU=0)
    assert evaluate([[0, 0]], [[1, 0]]) == evaluate([[0, 0]], [[0, 0]]) == nothing


# --- predict.py ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def project(data, tmp_path_factory):
    """The config of a small model, and its official file with random weights."""
    from vmamba_mm.checkpoints.names import to_official

    folder = tmp_path_factory.mktemp('project')
    load(CONFIGS[0], data).dump(folder / 'change.py')
    torch.manual_seed(0)
    model = RemoteSensingModel(SMALL, num_images=2)
    official = to_official(model.state_dict())
    assert 'conv_out_change.weight' in official and 'fuse_block4.fuse.1.running_var' in official
    torch.save(dict(net=official, optimizer={}), folder / 'checkpoint_epoch5.pth')
    return folder / 'change.py', folder / 'checkpoint_epoch5.pth'


def test_predict_draws_changes(project, data, call, tmp_path):
    before, after = data / 'test/A', data / 'test/B'
    code, out, err = call('predict.py', *project, before, '--after', after, '--device', 'cpu')
    assert code == 0, err
    assert len(out.splitlines()) >= 3 and out.count('changed ') == 3
    pictures = sorted((tmp_path / 'predictions').glob('*.png'))
    assert [p.name for p in pictures] == ['0.png', '1.png', '2.png']
    width, height = Image.open(pictures[0]).size
    assert width > 2 * height  # before, after, and the change
    code, out, err = call('predict.py', *project, before / '0.png', '--after', after / '2.png',
                          '--device', 'cpu')
    assert code == 0, err


def one_line(result):
    code, out, err = result
    line, = (line for line in err.splitlines() if line.startswith('error: '))
    assert code != 0 and 'Traceback' not in out + err
    return line, err


def test_predict_refuses_half_a_pair(project, data, call, tmp_path):
    before, after = data / 'test/A', data / 'test/B'
    line, _ = one_line(call('predict.py', *project, before))
    assert 'finds changes between two images' in line and '--after' in line
    line, _ = one_line(call('predict.py', *project, before, '--after', after / '0.png'))
    assert '3 image(s) and 1 after --after' in line
    alone = tmp_path / 'alone'
    save(alone / '0.png', np.zeros((80, 96, 3), np.uint8))
    line, _ = one_line(call('predict.py', *project, before, '--after', alone))
    assert f'the folder {alone} has no 1.png, 2.png' in line
    small = save(tmp_path / 'small.png', np.zeros((40, 96, 3), np.uint8))
    line, err = one_line(call('predict.py', *project, before / '0.png', '--after', small,
                              '--device', 'cpu'))
    assert 'could not be predicted' in line
    assert f'has 96x80 pixels and {small} 96x40' in err
