"""The tools on a tiny project of videos: train, resume, evaluate, predict, draw, count, errors."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_tools_errors import assert_one_line
from videos import cut, write_video

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli, flops
from vmamba_mm.paths import CONFIGS

ARCH = dict(embed_dims=16, depth=1, d_state=2, patch_size=8, image_size=16, num_frames=4,
            tubelet_size=1)
CONFIG = """
_base_ = [{base!r}]
model = dict(
    backbone=dict(type='vmamba_mm.VideoMamba', out_type='cls_token', arch={arch}),
    head=dict(num_classes=2, in_channels=16))
data_preprocessor = dict(num_classes=2)

for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
    pipeline[0].num_frames = 4
del pipeline
for step in _base_.augment:
    if step.type == 'vmamba_mm.RandomResizedCrop':
        step.scale = 16
del step
_base_.train_pipeline[1].transforms[0].transforms = _base_.augment
_base_.val_pipeline[1].transforms = [dict(type='ResizeEdge', scale=16, edge='short'),
                                     dict(type='CenterCrop', crop_size=16)]
_base_.test_pipeline[1].transforms[0].scale = 16
_base_.test_pipeline[2].crop_size = 16

root = dict(data_root={root!r}, data_prefix='', classes=['dark to light', 'light to dark'])
train_dataloader = dict(batch_size=3, num_workers={workers},
                        dataset=dict(pipeline=_base_.train_pipeline, **root))
val_dataloader = dict(batch_size=3, num_workers=0,
                      dataset=dict(pipeline=_base_.val_pipeline, **root))
test_dataloader = dict(batch_size=3, num_workers=0,
                       dataset=dict(pipeline=_base_.test_pipeline, **root))
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type='ConstantLR', factor=1.0)]
default_hooks = dict(logger=dict(interval=1))
"""


def make_data(root):
    """Three videos of a class for each split, and their lists."""
    for split in ('train', 'val'):
        lines = []
        for label in range(2):
            for i in range(3):
                name = f'{split}/{label}/{i}.mp4'
                write_video(root / name, count=12, frame=lambda t, label=label: np.full(
                    (24, 32, 3), 20 * (t if label == 0 else 11 - t), np.uint8))
                lines.append(f'{name} {label}')
        (root / f'{split}.csv').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    make_data(root)
    return root


@pytest.fixture
def project(made, tmp_path):
    """project(base, workers): a config of the data, which are copied for each test."""
    root = tmp_path / 'data'
    shutil.copytree(made, root)

    def project(base='ssv2', workers=1):
        config = tmp_path / f'{base}-{workers}.py'
        config.write_text(CONFIG.format(base=str(CONFIGS / f'_base_/tasks/video_{base}.py'),
                                        arch=ARCH, root=str(root), workers=workers))
        return config

    return project


def losses(work_dir):
    path, = work_dir.glob('*/vis_data/scalars.json')
    return [record['loss'] for record in map(json.loads, path.read_text().splitlines())
            if 'loss' in record]


def test_train_test_and_predict(project, call, tmp_path):
    """With two repeated augmentations, 2 clips x 3 crops in the test, and none lost on the way."""
    config = project()
    code, out, err = call('train.py', config, '--work-dir', 'run')
    assert code == 0, err[-2000:]
    checkpoint = tmp_path / 'run/epoch_2.pth'
    assert len(losses(tmp_path / 'run')) == 4 and (tmp_path / 'run/curves.png').is_file()

    code, out, err = call('test.py', config, checkpoint, '--out', 'out.pkl', '--show-dir', 'shown',
                          '--cfg-options', 'default_hooks.visualization.interval=2')
    assert code == 0 and 'accuracy/top1 = ' in out, err[-2000:]
    with open(tmp_path / 'out.pkl', 'rb') as file:
        results = pickle.load(file)
    assert len(results) == 6 and all(abs(r['pred_score'].sum() - 1) < 1e-5 for r in results)
    shown = sorted(p.relative_to(tmp_path / 'shown').as_posix()
                   for p in (tmp_path / 'shown').rglob('*.png'))
    assert shown == ['val/0/0.mp4.png', 'val/0/2.mp4.png', 'val/1/1.mp4.png']

    (tmp_path / 'data/val/0/1.mp4').write_bytes(b'no video')
    code, out, err = call('predict.py', config, checkpoint, 'data/val/0', '--out-dir', 'drawn')
    lines = [line for line in out.splitlines() if line.startswith('[')]
    assert code == 1 and [line.split(':')[0] for line in lines] == [
        '[1/3] data/val/0/0.mp4', '[3/3] data/val/0/2.mp4']
    assert 'dark to light' in lines[0] and 'light to dark' in lines[0]
    assert 'skipped: the video data/val/0/1.mp4 is corrupt, or no video' in err
    assert '1 of 3 videos could not be predicted' in err
    with Image.open(tmp_path / 'drawn/0.png') as picture:  # four frames, and bars beside them
        assert picture.width > 2 * picture.height


def test_augmentation_does_not_depend_on_workers(project, call, tmp_path):
    for workers in (0, 2):
        code, _, err = call('train.py', project('k400', workers), '--work-dir', f'run{workers}',
                            '--cfg-options', 'train_cfg.max_epochs=1', 'val_dataloader=None',
                            'val_cfg=None', 'val_evaluator=None',
                            'default_hooks.checkpoint.save_best=None')
        assert code == 0, err[-2000:]
    assert losses(tmp_path / 'run0') == losses(tmp_path / 'run2')


def test_mistakes_in_data(project, call, tmp_path):
    """One line that names the file, from a training's workers too."""
    config, data = project(), tmp_path / 'data'
    broken = data / 'train/1/2.mp4'
    cut(broken, 0.5)
    assert_one_line(call('train.py', config), f'the video {broken} is corrupt, or no video')
    broken.unlink()
    assert_one_line(call('train.py', config), f'the video {broken} does not exist')
    (data / 'train.csv').write_text('train/0/0.mp4 0\ntrain/0/1.mp4\n')
    assert_one_line(call('train.py', config), 'line 2 of', 'train.csv', 'the number of its class')
    (data / 'train.csv').write_text('train/0/0.mp4 0\ntrain/0/1.mp4 2\n')
    assert_one_line(call('train.py', config), 'train.csv has labels from 0 to 2', 'num_classes=2')


def test_flops_of_a_clip(project, mm):
    cfg = cli.load_config(str(project()))
    task = cli.find_task(cfg)
    assert (task.name, task.extra, task.scope) == ('video', 'video', 'mmpretrain')
    one = flops.count(cfg, (16, 16))
    cfg.test_dataloader.dataset.pipeline[0].num_frames = 8
    two = flops.count(cfg, (16, 16))
    assert one.notes == ['one clip of 4 frames'] and two.notes == ['one clip of 8 frames']
    tokens = (8 * 4 + 1) / (4 * 4 + 1)
    assert tokens - 0.1 < two.flops / one.flops < 2


def test_without_pyav(project, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)  # as if it were not installed
    with pytest.raises(UserError, match='the package av is not installed.*pip install av'):
        cli.load_config(str(project()))
