"""The tools on a tiny project of restoration: train with EMA, resume, test, predict, mistakes."""

import json

import cv2
import numpy as np
import pytest
import torch
from test_tools_errors import assert_one_line

from vmamba_mm.paths import CONFIGS

CONFIG = """
_base_ = [{base!r}]
model = dict(backbone=dict(arch=dict(
    _delete_=True, base='light_x2', embed_dims=30, depths=(1,), d_state=1)),
    test_cfg=dict(tile=10))
for pipeline in (_base_.train_pipeline,):
    pipeline[1].size = 16
del pipeline
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    data_root={root!r}, gt='HR', lq='LR', pipeline=_base_.train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root={root!r}, gt='HR', lq='LR'))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
custom_hooks = [dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.5)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.fixture
def project(tmp_path):
    """A config, and three pairs of images in data/."""
    rng = np.random.default_rng(0)
    for i in range(3):
        large = cv2.GaussianBlur(rng.integers(0, 256, (32, 40, 3)).astype(np.uint8), (5, 5), 0)
        for folder, name, image in (('HR', f'{i}', large), ('LR', f'{i}x2', large[::2, ::2])):
            (tmp_path / 'data' / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / f'data/{folder}/{name}.png'), image)
    config = tmp_path / 'config.py'
    base = CONFIGS / 'mambair/mambair-light-x2_2xb16-500k_div2k.py'
    config.write_text(CONFIG.format(base=str(base), root=str(tmp_path / 'data')))
    return config


def test_train_test_and_predict(project, call, tmp_path):
    code, out, err = call('train.py', project, '--work-dir', 'run')
    assert code == 0, err[-2000:]
    path, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len([r for r in records if 'loss' in r]) == 4
    psnr = [r['psnr'] for r in records if 'psnr' in r]
    assert len(psnr) == 2
    content = torch.load(tmp_path / 'run/iter_4.pth', weights_only=False)
    averaged, last = content['state_dict'], content['ema_state_dict']
    key = 'backbone.conv_first.weight'
    assert not torch.equal(averaged[key], last[f'module.{key}'])

    code, out, err = call('test.py', project, 'run/iter_4.pth', '--work-dir', 'tested')
    assert code == 0 and f'psnr = {psnr[-1]:.2f}' in out, (err[-2000:], out[-300:], psnr)

    (tmp_path / 'data/LR/1x2.png').write_bytes(b'no image')
    code, out, err = call('predict.py', project, 'run/iter_4.pth', 'data/LR', '--out-dir',
                          'restored')
    lines = [line for line in out.splitlines() if line.startswith('[')]
    assert code == 1 and [line.split(':')[0] for line in lines] == [
        '[1/3] data/LR/0x2.png', '[3/3] data/LR/2x2.png']
    assert '20x16 to 40x32, 8 bits -> restored/0x2.png' in lines[0]
    assert 'skipped: data/LR/1x2.png is corrupt, or no image' in err
    assert '1 of 3 images could not be restored' in err
    assert cv2.imread(str(tmp_path / 'restored/0x2.png')).shape == (32, 40, 3)
    # Again: the same names, and what it wrote is not taken for an image.
    (tmp_path / 'data/LR/1x2.png').unlink()
    code, out, err = call('predict.py', project, 'run/iter_4.pth', 'data/LR', '--out-dir',
                          'restored')
    assert code == 0 and sorted(p.name for p in (tmp_path / 'restored').iterdir()) == [
        '0x2.png', '2x2.png']


def test_mistakes_in_data(project, call, tmp_path):
    (tmp_path / 'data/LR/1x2.png').unlink()
    assert_one_line(call('train.py', project, '--work-dir', 'run'),
                    'data/HR/1.png has no degraded image')
    cv2.imwrite(str(tmp_path / 'data/LR/1x2.png'), np.zeros((9, 9, 3), np.uint8))
    assert_one_line(call('train.py', project, '--work-dir', 'run'),
                    'data/LR/1x2.png has 9x9 pixels')
