"""predict.py on many images: bad ones, equal names, any number of channels, any letters."""

import re

import numpy as np
import pytest
import tifffile
import tiny
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.mm import cli


def picture(path, size=(32, 32), colour=(200, 80, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)
    return path


def written(out):
    """{image: picture} of a run."""
    return dict(re.findall(r'^\[\d+/\d+\] (.+?): .* -> (.+)$', out, re.MULTILINE))


# --- names --------------------------------------------------------------------------------------

def test_nothing_is_overwritten(projects, call, tmp_path):
    """Equal stems, nested folders, capitals, numbers that are names, the images' own folder."""
    config, checkpoint, _ = projects('cls')
    folder = tmp_path / 'images'
    images = [picture(folder / name) for name in (
        'a.tiff', 'a.webp', 'a.bmp', 'A.png', 'a_1.jpg', 'x/a.bmp', 'x/y/a.bmp', 'a_2.bmp')]
    before = {path: path.read_bytes() for path in images}
    code, out, err = call('predict.py', config, checkpoint, folder, '--out-dir', folder)
    assert code == 0, err
    first = written(out)
    assert first.keys() == set(map(str, images))
    assert len({name.casefold() for name in first.values()}) == len(images)
    assert not {name.casefold() for name in first.values()} & {
        str(path).casefold() for path in images}
    assert {path: path.read_bytes() for path in images} == before
    # Again, in another order: the pictures of before are known, and replaced each by its own.
    code, out, err = call('predict.py', config, checkpoint, images[3], folder, images[3],
                          '--out-dir', folder)
    assert code == 0, err
    assert f'skipped {len(images)} picture(s) that predict.py drew' in err
    second = written(out)
    assert {k: v for k, v in second.items() if k != str(images[3])} == {
        k: v for k, v in first.items() if k != str(images[3])}
    assert f'-> {first[str(images[3])]}\n' in out
    assert {path: path.read_bytes() for path in images} == before


def test_one_run_after_the_other(projects, call, tmp_path):
    """Three runs, one image each; a file of somebody else's."""
    from vmamba_mm.mm.cli.images import made_from

    config, checkpoint, _ = projects('cls')
    other = picture(tmp_path / 'predictions/a.png').read_bytes()
    pictures = []
    for name in ('a.tiff', 'a.webp', 'b/a.tiff', 'a.tiff'):
        image = tmp_path / name
        picture(image)
        code, out, err = call('predict.py', config, checkpoint, image)
        assert code == 0, err
        pictures.append(written(out)[str(image)])
    assert pictures[0] == pictures[3] and len(set(pictures)) == 3
    assert (tmp_path / 'predictions/a.png').read_bytes() == other
    assert made_from(tmp_path / pictures[1]).startswith('a.webp ')
    assert made_from(tmp_path / 'predictions/a.png') is None


# --- bad images ---------------------------------------------------------------------------------

@pytest.fixture
def odd(tmp_path):
    """Good ones, bad ones, and what is no image at all."""
    folder = tmp_path / 'odd'
    for name in ('good.png', 'also/good.jpg', '._a.jpg', '.thumbs/b.jpg'):
        picture(folder / name)
    (folder / '.DS_Store').write_bytes(b'x')
    (folder / 'bad.jpg').write_bytes(b'not an image')
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'link.jpg').symlink_to(tmp_path / 'nowhere.jpg')
    (folder / 'folder.jpg').mkdir()
    tifffile.imwrite(folder / 'float.tiff', np.ones((32, 32), np.float32))
    picture(folder / 'thin.png', (1, 400))  # no pixel wide at the detector's size
    return folder


@pytest.mark.parametrize('task', ['cls', 'det'])
def test_bad_images_among_good_ones(task, projects, call, odd, tmp_path):
    config, checkpoint, _ = projects(task)
    code, out, err = call('predict.py', config, checkpoint, odd)
    assert code == 1 and 'Traceback' not in err
    assert len(written(out)) == len(list((tmp_path / 'predictions').iterdir())) == 7 - len(
        [line for line in err.splitlines() if line.startswith('skipped: ')])
    hidden, = re.findall('skipped 3 hidden .*', err)
    assert all(name in hidden for name in ('._a.jpg', '.DS_Store', '.thumbs/b.jpg'))
    told = {name: line for line in err.splitlines() if line.startswith('skipped: ')
            for name in re.findall(r'odd/(\w+)\.', line)}
    assert all('corrupt' in told[name] for name in ('bad', 'empty'))
    assert 'No such file' in told['link'] and 'corrupt' not in told['float'] + told['link']
    failed = {'bad', 'empty', 'link', 'float'} | ({'thin'} if task == 'det' else set())
    assert told.keys() == failed
    if task == 'det':
        assert 'corrupt' not in told['thin'] and 'step Resize' in told['thin']
        assert '1x400 pixels' in told['thin']
    assert_one_line((code, out, err), f'{len(failed)} of 7 images could not be predicted',
                    'bad.jpg')


def test_model_that_fails_on_an_image(projects, call, tmp_path):
    """The file is sound, and the error is the model's; the channels do not exist."""
    config, checkpoint, images = projects('cls')
    good = sorted(images.iterdir())[0]
    line = assert_one_line(
        call('predict.py', config, checkpoint, good, '--cfg-options',
             'data_preprocessor.mean=[1,2]', 'data_preprocessor.std=[1,2]'), good,
        '1 of 1', 'the model fails on', '32x32')
    assert 'corrupt' not in line
    assert_one_line(call('predict.py', config, checkpoint, good, '--channels', 0, 3, 1), good,
                    '--channels 0 3 1', '3 channel(s)')
    assert_one_line(call('predict.py', config, checkpoint, good, '--channels', 0, 1), '--channels')


# --- channels -----------------------------------------------------------------------------------

LOADERS = {
    'tifffile': "dict(type='LoadImageFromFile', color_type='unchanged', "
                "imdecode_backend='tifffile')",
    'own': "dict(type='LoadBands')"}
OWN_LOADER = '''
import numpy as np
import tifffile
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadBands(BaseTransform):
    def transform(self, results):
        results['img'] = tifffile.imread(results['img_path']).astype(np.float32)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results
'''


def bands_config(folder, channels, loader):
    """A classification of TIFF images with this many channels, and its data."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('blue', 'red'):
            for i in range(2):
                path = folder / 'data' / split / name / f'{i}.tif'
                path.parent.mkdir(parents=True, exist_ok=True)
                image = rng.integers(0, 4000, (32, 32, channels), np.uint16)
                tifffile.imwrite(path, image.squeeze())
    text = tiny.cls_config(folder / 'data', workers=0, epochs=1, batch=2, augment=None)
    text = text.replace("dict(type='LoadImageFromFile')", LOADERS[loader])
    text = text.replace("type='vmamba_mm.VMamba',", "type='vmamba_mm.VMamba', "
                        f'in_channels={channels},')
    text = text.replace('mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True',
                        f'mean=[2000] * {channels}, std=[1000] * {channels}, to_rgb=False')
    if loader == 'own':
        (folder / 'bands.py').write_text(OWN_LOADER)
        text += (f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
                 "custom_imports = dict(imports=['bands'])\n")
    text += "default_hooks['visualization'] = dict(type='VisualizationHook', interval=1)\n"
    config = folder / 'config.py'
    config.write_text(text)
    return config


def make_checkpoint(config, path):
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(config, import_custom_modules=False)
    init_default_scope('mmpretrain')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), path)
    return path


@pytest.mark.parametrize(('channels', 'loader'), [(6, 'tifffile'), (6, 'own')])
def test_other_numbers_of_channels(channels, loader, projects, call, tmp_path):
    projects('cls')  # the packages are ready
    config = bands_config(tmp_path, channels, loader)
    checkpoint = make_checkpoint(config, tmp_path / 'model.pth')
    images = tmp_path / 'data/val'
    picks = ['--channels', 5, 3, 1] if loader == 'own' else []
    code, out, err = call('predict.py', config, checkpoint, images, *picks)
    assert code == 0, err
    chosen = '5, 3, 1' if picks else '0, 1, 2'
    assert len(re.findall(f'drawing channels? {chosen} of {channels} ', out)) == 1
    assert len(written(out)) == 4
    code, out, err = call('test.py', config, checkpoint, '--show-dir', tmp_path / 'shown', *picks)
    assert code == 0, err
    assert f'{chosen} of {channels} ' in out + err
    shown = sorted(str(p.relative_to(tmp_path / 'shown'))
                   for p in (tmp_path / 'shown').rglob('*.png'))
    assert shown == [f'val/{name}/{i}.tif.png' for name in ('blue', 'red') for i in range(2)]


def test_pictures_of_any_image():
    from vmamba_mm.mm.pictures import Pictures, default_channels, to_picture

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(to_picture(colours, (2, 1, 0)), colours[..., ::-1])
    np.testing.assert_array_equal(to_picture(colours.astype(np.float32), (0, 1, 2)), colours)
    grey = to_picture(colours[..., 0], (0,))
    np.testing.assert_array_equal(grey, np.repeat(colours[..., :1], 3, 2))
    for image in (rng.random((5, 7)), rng.random((5, 7, 3)) * 1e-3, rng.normal(size=(5, 7, 2)),
                  rng.integers(0, 60000, (5, 7, 4), np.uint16), np.full((5, 7, 6), np.inf),
                  rng.random((5, 7, 3)) > 0.5, np.zeros((5, 7, 1), np.float16)):
        count = image.shape[2] if image.ndim == 3 else 1
        found = Pictures()(image)
        assert found.shape == (5, 7, 3) and found.dtype == np.uint8
        if np.isfinite(image).all() and np.ptp(image.astype(float)) > 0:
            assert found.min() == 0 and found.max() == 255
        assert len(default_channels(count)) in (1, 3) and max(default_channels(count)) < count
    holes = rng.random((5, 7))
    holes[0, 0] = np.nan
    assert np.ptp(to_picture(holes, (0,))) == 255


# --- test.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize('task', ['det', 'seg'])
def test_show_dir(task, projects, call, tmp_path):
    """A picture for each image, at its place, of detectors and segmentors too."""
    config, checkpoint, images = projects(task)
    code, out, err = call('test.py', config, checkpoint, '--show-dir', 'shown')
    assert code == 0, err
    shown = {p.relative_to(tmp_path / 'shown').as_posix()
             for p in (tmp_path / 'shown').rglob('*') if p.is_file()}
    below = images.relative_to(config.parent / 'data').as_posix()
    assert shown == {f'{below}/{p.name}.png' for p in images.iterdir()}


@pytest.mark.parametrize('task', ['cls', 'det'])
def test_letters_that_no_font_has(task, projects, call, tmp_path):
    """No boxes, no warnings, one line; printed names stay as they are."""
    import torch

    config, checkpoint, images = projects(task)
    state = torch.load(checkpoint, weights_only=False)
    count = {'cls': 2, 'det': 1}[task]
    name = 'm\u0378'  # not assigned
    state['meta'] = dict(dataset_meta=dict(classes=[name] * count, palette=[(9, 9, 9)] * count))
    torch.save(state, tmp_path / 'model.pth')
    code, out, err = call('predict.py', config, tmp_path / 'model.pth', images, '--score-thr', 0)
    assert code == 0, err
    assert name in out and 'missing from' not in err
    assert len(re.findall(r'no font .*u0378', err)) == 1


# --- scopes -------------------------------------------------------------------------------------

@pytest.mark.parametrize(('scope', 'kind'), [
    ("'mmaction'", "'ImageClassifier'"), ('None', "'ImageClassifier'"),
    ("'mmpretain'", "'ImageClassifier'"), ("'mmengine'", "'mmrotate.OrientedRCNN'"),
    ("'mmaction'", "'mmpretrain.ImageClassifier'")])
@pytest.mark.parametrize('tool', ['predict.py', 'test.py'])
def test_unknown_scope(tool, scope, kind, projects, call, tmp_path):
    config, checkpoint, images = projects('cls')
    other = tmp_path / 'other.py'
    other.write_text(config.read_text().replace("default_scope = 'mmpretrain'",
                                                f'default_scope = {scope}')
                     .replace("type='ImageClassifier'", f'type={kind}'))
    more = [images] if tool == 'predict.py' else []
    assert_one_line(call(tool, other, checkpoint, *more), kind, scope, "'mmpretrain', 'mmdet', "
                    "'mmseg'")


def test_task_of_a_model(mm):
    import mmdet.models
    import mmpretrain.models
    from mmengine.config import ConfigDict
    from mmengine.model import BaseModel

    from vmamba_mm.heads import VideoClassifier
    from vmamba_mm.mm.restoration.models import ImageRestorer

    class Mine(mmdet.models.MaskRCNN):
        pass

    def task(kind, scope=None, **model):
        found = cli.find_task(ConfigDict(model=dict(type=kind, **model), default_scope=scope))
        return found and found.name

    assert task('MaskRCNN', 'mmdet') == 'det'
    assert task('mmdet.MaskRCNN', 'mmengine') == task('mmdet.MaskRCNN', 'mmseg') == 'det'
    assert task('mmdet.models.detectors.MaskRCNN') == 'det'
    assert task(Mine) == task(mmdet.models.MaskRCNN, 'mmengine') == 'det'
    assert task(mmpretrain.models.ImageClassifier) == 'cls'
    assert task('vmamba_mm.VideoClassifier', 'mmpretrain') == task(VideoClassifier) == 'video'
    assert task('VideoClassifier', 'vmamba_mm') == 'video'
    assert task('vmamba_mm.ImageRestorer') == task(ImageRestorer, 'mmengine') == 'restoration'
    assert task('vmamba_mm.PointClassifier', 'mmengine') == 'points'
    assert task('vmamba_mm.PointSegmentor', 'mmengine') == 'parts'
    assert task('EncoderDecoder', 'mmengine', _scope_='mmseg') == 'seg'
    # Nobody's: what works without a task goes on.
    assert task('vmamba_mm.VMamba', 'mmengine') is task(BaseModel) is None
    cfg = ConfigDict(model=dict(type=Mine))
    cli.find_task(cfg)
    assert cfg.default_scope == 'mmdet'
