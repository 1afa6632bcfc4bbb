"""Testing and predicting for the three tasks; help; what train.py leaves behind."""

import json
import subprocess
import sys

import pytest
import tiny
from PIL import Image


def test_help(call, tmp_path):
    """One of them as it really starts, from any folder; nothing that it imports prints."""
    done = subprocess.run([sys.executable, tiny.TOOLS / 'train.py', '--help'], cwd=tmp_path,
                          capture_output=True, text=True)
    others = [call(tool, '--help') for tool in ('test.py', 'predict.py')]
    for code, out, err in ((done.returncode, done.stdout, done.stderr), *others):
        assert code == 0 and err == ''
        assert 'examples:' in out and '--cfg-options' in out


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_predict(task, projects, call, tmp_path):
    config, checkpoint, images = projects(task)
    first = sorted(images.iterdir())[0]
    code, out, err = call('predict.py', config, checkpoint, first, images, '--out-dir',
                          tmp_path / 'drawn', '--score-thr', 0)
    assert code == 0, err
    count = 1 + len(list(images.iterdir()))
    pictures = sorted((tmp_path / 'drawn').iterdir())
    assert len(pictures) == count
    assert all(Image.open(p).size[0] >= 32 for p in pictures)
    lines = [line for line in out.splitlines() if line.startswith('[')]
    assert len(lines) == count and str(pictures[0]) in lines[0]
    named = {'cls': 'red', 'det': 'object(s)', 'seg': '%'}[task]
    assert named in lines[0]


def test_seg_tta_and_outputs(projects, call, tmp_path):
    config, checkpoint, _ = projects('seg')
    results = {}
    for name, argv in (('plain', ['--out', tmp_path / 'maps']),
                       ('tta', ['--tta', '--out', tmp_path / 'tta.json'])):
        code, out, err = call('test.py', config, checkpoint, *argv)
        assert code == 0, err
        results[name] = next(line for line in out.splitlines() if line.startswith('mIoU ='))
    assert json.loads((tmp_path / 'tta.json').read_text()).keys() >= {'mIoU', 'mAcc', 'aAcc'}
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 7


def test_cls_tta_uses_the_mirror_image(projects, call, tmp_path):
    config, checkpoint, _ = projects('cls')
    metrics = tmp_path / 'metrics.json'
    code, out, err = call('test.py', config, checkpoint, '--tta', '--out', metrics)
    assert code == 0, err
    assert 'mirror image' in out
    assert json.loads(metrics.read_text()).keys() == {'accuracy/top1'}


def test_det_predictions(projects, call, tmp_path):
    config, checkpoint, _ = projects('det')
    code, out, err = call('test.py', config, checkpoint, '--out', tmp_path / 'found.pkl')
    assert code == 0, err
    assert (tmp_path / 'found.pkl').stat().st_size > 1000
    assert 'coco/segm_mAP = ' in out
    code, _, err = call('test.py', config, checkpoint, '--tta')
    assert code == 1 and 'error: mmdet has no test-time augmentation' in err


def test_det_trains_and_leaves_its_curves(projects, call, tmp_path):
    config, _, _ = projects('det')
    code, out, err = call('train.py', config, '--work-dir', tmp_path / 'w', '--auto-scale-lr')
    assert code == 0, err
    assert (tmp_path / 'w' / 'epoch_1.pth').is_file()
    assert Image.open(tmp_path / 'w' / 'curves.png').size[0] > 600
    assert list((tmp_path / 'w').glob('*/vis_data/events.out.tfevents.*'))
    assert 'eta:' in out


def test_missed_validation_is_done_on_resume(projects, call, tmp_path):
    """A run killed after saving its last epoch and before validating it."""
    config, _, _ = projects('cls')
    work = tmp_path / 'w'
    argv = ['train.py', config, '--work-dir', work, '--cfg-options', 'train_cfg.max_epochs=3']
    assert call(*argv)[0] == 0
    log = next(work.glob('*/vis_data/scalars.json'))
    complete = log.read_text().splitlines(keepends=True)
    assert 'accuracy' in complete[-1]
    log.write_text(''.join(complete[:-1]))
    code, out, err = call(*argv[:4], '--resume', *argv[4:])
    assert code == 0, err
    assert 'was not finished' in out
    logs = sorted(work.glob('*/vis_data/scalars.json'))
    again = json.loads(logs[-1].read_text().splitlines()[-1])
    assert again['accuracy/top1'] == json.loads(complete[-1])['accuracy/top1']
    # Done once, not again.
    code, out, _ = call(*argv[:4], '--resume', *argv[4:])
    assert code == 0 and 'was not finished' not in out
