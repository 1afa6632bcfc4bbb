"""The fast training transforms give the stock image for the same seed."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
FAST = 'configs/vmamba/vmamba-tiny-s1l8_8xb128-fast_in1k-224.py'
STOCK = 'configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py'


@pytest.fixture(scope='module')
def fast(mm):
    pytest.importorskip('mmpretrain')
    import vmamba_mm.mm.transforms
    return vmamba_mm.mm.transforms


def photo(height, width, seed=0):
    """Smooth shapes and a little noise."""
    import cv2
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def images():
    rng = np.random.default_rng(1)
    yield 'photo', photo(224, 224)
    yield 'odd size', photo(75, 101)
    yield 'flipped view', photo(224, 224)[:, ::-1]
    yield 'noise', rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    yield 'narrow range', rng.integers(90, 130, (64, 48, 3), dtype=np.uint8)
    yield 'one value', np.full((32, 32, 3), 77, np.uint8)
    yield 'two values', np.where(rng.random((32, 32, 3)) < 0.2, 3, 250).astype(np.uint8)
    flat = photo(64, 64)
    flat[..., 1] = 0
    yield 'one flat channel', flat
    yield 'few pixels', rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # Equalize's step is 0


IMAGES = dict(images())


def apply(transform, image, seed, **results):
    """The results of a transform, and numpy's next number."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    results = transform(dict(img=image.copy() if image.flags.c_contiguous else image, **results))
    return results, np.random.random_sample()


def assert_same(ours, theirs):
    assert np.array_equal(ours[0]['img'], theirs[0]['img'])
    assert ours[0]['img'].dtype == np.uint8
    assert {k: v for k, v in ours[0].items() if k != 'img'} == \
        {k: v for k, v in theirs[0].items() if k != 'img'}
    assert ours[1] == theirs[1]  # as many numbers were drawn


# -- RandomResizedCrop ---------------------------------------------------------------------

SIZES = [(375, 500), (500, 333), (160, 120), (60, 400), (401, 224)]


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_crop_by_pillow_is_stock(size, fast):
    settings = dict(scale=(96, 128), interpolation='bicubic', backend='pillow')
    ours, theirs = (m.RandomResizedCrop(**settings) for m in (fast, fast.stock))
    for seed in range(20):
        image = photo(*size, seed)
        assert_same(apply(ours, image, seed), apply(theirs, image, seed))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_crop_by_torch_is_within_a_grey_level(interpolation, fast):
    ours = fast.RandomResizedCrop(224, interpolation=interpolation)
    theirs = fast.stock.RandomResizedCrop(224, interpolation=interpolation, backend='pillow')
    assert ours.backend == 'torch'
    difference = []
    for seed in range(40):
        image = photo(*SIZES[seed % len(SIZES)], seed)
        mine, stock = apply(ours, image, seed), apply(theirs, image, seed)
        assert mine[0]['img'].flags.c_contiguous and mine[0]['img'].dtype == np.uint8
        assert mine[0]['img_shape'] == stock[0]['img_shape'] == (224, 224, 3)
        assert mine[1] == stock[1]
        difference.append(mine[0]['img'].astype(int) - stock[0]['img'])
    difference = np.stack(difference)
    assert (np.abs(difference) > 1).mean() < 2e-4
    assert (difference != 0).mean() < 0.15
    assert abs(difference.mean()) < 2e-3


def test_crop_by_torch_is_as_exact_as_pillow(fast):
    errors = dict(torch=[], pillow=[])
    for seed in range(10):
        image = photo(300, 400, seed)
        np.random.seed(seed)
        transform = fast.RandomResizedCrop(224, interpolation='bicubic')
        y, x, h, w = transform.rand_crop_params(image)
        crop = torch.from_numpy(image[y:y + h, x:x + w].copy())[None].permute(0, 3, 1, 2)
        exact = torch.nn.functional.interpolate(
            crop.double(), (224, 224), mode='bicubic', antialias=True)[0]
        exact = exact.permute(1, 2, 0).clamp(0, 255).numpy()
        for backend, found in errors.items():
            transform = fast.RandomResizedCrop(224, interpolation='bicubic', backend=backend)
            result, _ = apply(transform, image, seed)
            found.append(np.abs(result['img'] - exact).mean())
    assert np.mean(errors['torch']) < 1.02 * np.mean(errors['pillow'])


def test_crop_refuses(fast):
    with pytest.raises(ValueError, match="backend must be 'torch' or 'pillow', not 'cv2'"):
        fast.RandomResizedCrop(224, backend='cv2')
    with pytest.raises(ValueError, match="'bilinear' or 'bicubic'.* not 'lanczos'"):
        fast.RandomResizedCrop(224, interpolation='lanczos')


# -- RandomFlip, RandAugment ---------------------------------------------------------------

@pytest.mark.parametrize('settings', [
    dict(prob=0.5), dict(prob=0.3, direction='vertical'), dict(prob=0.), dict(prob=1.),
    dict(prob=[0.4, 0.3], direction=['horizontal', 'diagonal'])], ids=str)
def test_flip_is_stock(settings, fast):
    ours, theirs = fast.RandomFlip(**settings), fast.MMCVRandomFlip(**settings)
    flips = 0
    for seed in range(60):
        mine = apply(ours, IMAGES['odd size'], seed)
        assert_same(mine, apply(theirs, IMAGES['odd size'], seed))
        flips += mine[0]['flip']
        if mine[0]['flip_direction'] == 'horizontal':
            assert mine[0]['img'].flags.c_contiguous
    assert 0 < flips < 60 or settings['prob'] in (0., 1.)


@pytest.mark.parametrize('name', IMAGES)
@pytest.mark.parametrize('settings', [
    dict(type='AutoContrast'), dict(type='Equalize'), dict(type='Contrast', magnitude=0.7),
    dict(type='Contrast', magnitude_range=(0, 0.9), magnitude_level=9, magnitude_std=0.5),
], ids=str)
def test_operation_is_stock(settings, name, fast):
    settings = dict(settings)
    operation = settings.pop('type')
    ours, theirs = getattr(fast, operation)(**settings), getattr(fast.stock, operation)(**settings)
    assert operation in fast.FASTER
    for seed in range(8):  # half of them draw not to be applied
        assert_same(apply(ours, IMAGES[name], seed), apply(theirs, IMAGES[name], seed))


def test_randaugment_is_stock(fast, read_config):
    settings = dict(read_config(STOCK).train_dataloader.dataset.pipeline[3])
    assert settings.pop('type') == 'RandAugment'
    ours, theirs = fast.RandAugment(**settings), fast.stock.RandAugment(**settings)
    own = {type(t) for t in ours.transforms if type(t).__module__ == fast.__name__}
    assert own == set(fast.FASTER.values())
    assert [type(t).__name__ for t in ours.transforms] == \
        [type(t).__name__ for t in theirs.transforms]
    for seed in range(300):
        name = ('photo', 'noise', 'flipped view')[seed % 3]
        assert_same(apply(ours, IMAGES[name], seed), apply(theirs, IMAGES[name], seed))


def test_randaugment_policies(fast, read_config):
    read_config(STOCK)  # the scope, in which a policy of one's own is looked up
    names = ('Equalize', 'mmpretrain.Equalize', 'mmpretrain.datasets.transforms.Equalize', 'Invert')
    own = fast.RandAugment([dict(type=name) for name in names], 1, 9)
    assert [type(t).__module__ == fast.__name__ for t in own.transforms] == [True] * 3 + [False]
    with pytest.raises(ValueError, match="'timm_increasing'.* not 'rand-m9'"):
        fast.RandAugment('rand-m9', 2, 9)


# -- RandomErasing, PackInputs -------------------------------------------------------------

@pytest.mark.parametrize('settings', [
    dict(mode='const', fill_color=(1, 2, 3)), dict(mode='rand')], ids=str)
def test_erasing_without_normal_noise_is_stock(settings, fast):
    ours, theirs = (m.RandomErasing(erase_prob=0.5, **settings) for m in (fast, fast.stock))
    for seed in range(20):
        assert_same(apply(ours, IMAGES['photo'], seed), apply(theirs, IMAGES['photo'], seed))


def test_erasing_takes_the_stock_places(fast):
    settings = dict(erase_prob=0.25, mode='rand', min_area_ratio=0.02, max_area_ratio=1 / 3,
                    fill_color=[60., 70., 80.], fill_std=[1e-3] * 3)  # noise is 1 level at most
    ours, theirs = (m.RandomErasing(**settings) for m in (fast, fast.stock))
    image = np.full((224, 224, 3), 200, np.uint8)
    erased = 0
    for seed in range(100):
        mine, stock = (apply(t, image, seed)[0]['img'] for t in (ours, theirs))
        assert np.array_equal(mine == 200, stock == 200)
        assert np.abs(mine.astype(int) - stock).max() <= 1
        erased += (mine != 200).any()
    assert 10 < erased < 40


@pytest.mark.parametrize('mean, std', [([103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
                                       ([3., 128., 250.], [50., 0.6, 20.])], ids=['recipe', 'cut'])
def test_noise_of_erasing_has_the_stock_distribution(mean, std, fast):
    """A normal one, cut to whole numbers towards 0 and to 0..255. The seeds are fixed."""
    np.random.seed(0)
    torch.manual_seed(0)
    height, width = 800, 1250
    value = np.arange(1, 256)[:, None]
    expected = 0.5 + 0.5 * torch.erf(torch.from_numpy((value - mean) / std) / 2 ** 0.5).numpy()
    for module in (fast, fast.stock):
        erasing = module.RandomErasing(mode='rand', fill_color=mean, fill_std=std)
        filled = erasing._fill_pixels(np.zeros((height, width, 3), np.uint8), 0, 0, height, width)
        pixels = filled.reshape(-1, 3)
        for c in range(3):
            found = np.cumsum(np.bincount(pixels[:, c], minlength=256))[:255] / len(pixels)
            # Kolmogorov-Smirnov: further apart with a probability of 1e-4
            assert np.abs(found - expected[:, c]).max() < 2.2 / len(pixels) ** 0.5
            for other in (pixels[:, (c + 1) % 3], np.roll(pixels[:, c], 1)):
                assert abs(np.corrcoef(pixels[:, c], other)[0, 1]) < 0.005


@pytest.mark.parametrize('image', [
    *IMAGES.values(), np.ones((9, 7), np.uint8), np.ones((9, 7, 3), np.float32),
    np.ones((9, 7, 4), np.uint8)], ids=[*IMAGES, 'grey', 'float', 'four channels'])
def test_pack_is_stock(image, fast):
    data = dict(img=image, gt_label=3, img_path='a.jpg', ori_shape=(5, 6), img_shape=(9, 7, 3),
                flip=True, flip_direction='horizontal', sample_idx=4)
    ours, theirs = (m.PackInputs()(dict(data)) for m in (fast, fast.stock))
    assert torch.equal(ours['inputs'], theirs['inputs'])
    assert ours['inputs'].dtype == theirs['inputs'].dtype and ours['inputs'].is_contiguous()
    assert ours['data_samples'].metainfo == theirs['data_samples'].metainfo
    assert ours['data_samples'].gt_label.tolist() == [3]


# -- the config ----------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    import cv2
    for i in range(8):
        path = tmp_path / f'train/{i % 2}'
        path.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path / f'{i}.jpg'), photo(250 + 20 * i, 300, i))
    return tmp_path


def test_config_says_what_the_standard_one_says(read_config):
    ours, theirs = read_config(FAST).to_dict(), read_config(STOCK).to_dict()
    mine = ours['train_dataloader']['dataset'].pop('pipeline')
    stock = theirs['train_dataloader']['dataset'].pop('pipeline')
    assert mine[1].pop('backend') == 'torch' and stock[1].pop('backend') == 'pillow'
    for a, b in zip(mine, stock, strict=True):
        name = b['type'] if b['type'] == 'LoadImageFromFile' else f'vmamba_mm.{b["type"]}'
        assert a == dict(b, type=name)
    for key in ('train_pipeline', 'filename'):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


def test_pipeline_of_the_config_is_stock(read_config, folder):
    """From the file to the packed tensor; Pillow's resize, and no noise."""
    from mmengine.registry import TRANSFORMS
    built = []
    for path in (FAST, STOCK):
        pipeline = read_config(path).train_dataloader.dataset.pipeline
        pipeline[1].backend = 'pillow'
        pipeline[4].erase_prob = 0.
        built.append([TRANSFORMS.build(t) for t in pipeline])
    for seed in range(60):
        packed = []
        for transforms in built:
            np.random.seed(seed)
            data = dict(img_path=str(folder / f'train/{seed % 2}/{seed % 8}.jpg'), gt_label=1)
            for transform in transforms:
                data = transform(data)
            packed.append(data)
        assert torch.equal(packed[0]['inputs'], packed[1]['inputs'])
        assert packed[0]['data_samples'].metainfo == packed[1]['data_samples'].metainfo


@pytest.mark.parametrize('base', ['path', 'package'])
def test_batches_of_the_config(base, read_config, folder):
    """Through worker processes and the data preprocessor, Mixup and CutMix included."""
    from mmengine.registry import MODELS
    from mmengine.runner import Runner
    config = folder / 'config.py'
    name = REPO / FAST if base == 'path' else 'vmamba_mm::' + FAST.removeprefix('configs/')
    config.write_text(f'_base_ = {str(name)!r}\n')
    cfg = read_config(config)
    cfg.train_dataloader.update(batch_size=4, num_workers=2, collate_fn=dict(
        type='default_collate'))
    dataset = cfg.train_dataloader.dataset
    dataset.update(type='CustomDataset', data_root=f'{folder}/', data_prefix='train')
    dataset.pop('split')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    preprocessor = MODELS.build(dict(
        type='ClsDataPreprocessor', **cfg.data_preprocessor, batch_augments=cfg.model.train_cfg))
    batches = [preprocessor(batch, training=True) for batch in loader]
    assert len(batches) == 2
    for batch in batches:
        assert batch['inputs'].shape == (4, 3, 224, 224) and batch['inputs'].isfinite().all()
        assert all(s.gt_score.sum().item() == pytest.approx(1) for s in batch['data_samples'])


def test_benchmark(folder):
    """It checks before it times, and says what it timed."""
    pytest.importorskip('mmpretrain')
    done = subprocess.run(
        [sys.executable, REPO / 'tools/bench/data_pipeline.py', '--images', folder, '--rounds',
         '1', '--out', folder / 'out.json'], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert '8 images: the fast pipeline with backend=pillow gives the stock bits' in done.stdout
    assert 'images/s per core' in done.stdout and (folder / 'out.json').is_file()
