"""The demo set of videos: real files, held-out digits; no single frame tells the direction."""

import importlib.util

import numpy as np
import pytest
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.mm.video.reader import Video
from vmamba_mm.paths import CONFIGS

for package in ('av', 'mlxtend', 'skimage', 'sklearn'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extras 'demo' and 'video')",
                    allow_module_level=True)

MOVING, SINGLE = (CONFIGS / 'demo' / f'videomamba_{name}-32.py'
                  for name in ('moving-digits', 'single-frame'))


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield load('demo/make_data.py'), load('demo/clips.py')


@pytest.fixture(scope='module')
def settings(tools):
    return {**tools[0].DEFAULTS, 'clips_per_class': (4, 2)}


@pytest.fixture(scope='module')
def root(tools, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools[0].build(path, settings, ['clips'])
    return path / 'clips'


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*.mp4'))}


def test_files_of_each_class(root, tools, settings):
    names = sorted(tools[1].class_names(settings['clip_digits']))
    for split, count in (('train', 4), ('val', 2)):
        assert sorted(p.name for p in (root / split).iterdir()) == names
        for name in names:
            files = sorted((root / split / name).iterdir())
            assert len(files) == count
            for path in files:
                with Video(path) as video:
                    assert video.num_frames == settings['clip_frames']
                    frames = video.read(range(video.num_frames))
                assert frames.shape[1:] == (settings['clip_size'],) * 2 + (3,)
                assert tools[1].way_of(frames) == name.split()[1]


def test_the_same_bytes_each_time(root, tools, settings, tmp_path):
    tools[0].build(tmp_path, settings, ['clips'])
    assert content(tmp_path / 'clips') == content(root)


def test_the_middle_frame_does_not_tell_the_direction(tools, settings):
    """A digit is at the same places then, whichever way it goes: only the drawn numbers decide."""
    _, clips = tools
    middle = {}
    for name, direction in clips.DIRECTIONS.items():
        rng = np.random.default_rng(3)
        frames = clips.draw_clip(rng, 'train', 5, direction, {
            **settings, 'clip_frames': 3}).astype(float)
        middle[name] = frames[1]
        assert np.abs(frames[0] - frames[2]).max() > 50
    assert all((frame == middle['left']).all() for frame in middle.values())


@pytest.mark.parametrize('config', [MOVING, SINGLE], ids=['moving', 'single'])
def test_config_fits_the_set(config, tools, settings):
    cfg = cli.load_config(str(config))
    frames = cfg.model.backbone.arch.num_frames
    assert frames == (1 if config == SINGLE else 6)
    assert cfg.model.head.num_classes == len(tools[1].class_names(settings['clip_digits']))
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = cfg[name].dataset
        assert dataset.data_root == 'data/demo/clips' and dataset.pipeline[0].num_frames == frames
        assert 'Flip' not in str(dataset.pipeline)  # left would be right


def test_the_two_configs_differ_in_the_frames_alone():
    moving, single = (cli.load_config(str(path)) for path in (MOVING, SINGLE))
    single.model.backbone.arch.num_frames = 6
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        single[name].dataset.pipeline[0].num_frames = 6
    for key in ('model', 'data_preprocessor', 'train_dataloader', 'val_dataloader',
                'test_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg'):
        assert single[key] == moving[key], key


def test_a_tiny_run(root, call, tmp_path, load_tool):
    """Train, evaluate, predict and the page, on the tiny set."""
    data = [f'{name}_dataloader.dataset.data_root={root}' for name in ('train', 'val', 'test')]
    options = ['--cfg-options', *data, 'train_cfg.max_epochs=2', 'train_dataloader.batch_size=8',
               'model.backbone.arch.depth=1']
    code, out, err = call('train.py', MOVING, '--work-dir', 'run', *options)
    assert code == 0, err[-2000:]
    clip = root / 'val/one left'
    code, out, err = call('predict.py', MOVING, 'run/epoch_2.pth', clip, '--out-dir', 'drawn',
                          *options)
    assert code == 0 and 'one left' in out, err[-2000:]
    page = load_tool('demo/report.py').contact_sheet(
        tmp_path / 'page.png', 'A title', ['top1 = 95'], tmp_path / 'run/curves.png',
        tmp_path / 'drawn')
    assert page.is_file()
