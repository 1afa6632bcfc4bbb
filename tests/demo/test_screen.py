"""What a demo shows of a tool's output, and what it keeps."""
import sys

import pytest
from running import loading_tools


@pytest.fixture(scope='module')
def screen():
    with loading_tools() as load:
        yield load('demo/screen.py')


STAMP = '11/29 13:03:52 - mmengine - '
HIDDEN = ['', '    sys.platform: linux', 'max_epochs = 12', "    type='Runner')",
          '|    IoU    |  80.1  |', '(ABOVE_NORMAL) EMAHook', 'Could not import OneDL',
          'loading annotations into memory...',
          '/a/b.py:33: UserWarning: Fail to import', "  warnings.warn('Fail to import",
          f'{STAMP}INFO - Iter(val) [ 50/100]    eta: 0:00:03  time: 0.1  data_time: 0.2',
          f'{STAMP}INFO - ', f'{STAMP}INFO - Config:', f'{STAMP}INFO - Hooks will be executed in',
          f'{STAMP}INFO - paramwise_options -- norm.weight:weight_decay=0.0',
          f'{STAMP}WARNING - "FileClient" will be deprecated in future.']
SHOWN = {
    'Done. Checkpoints are in work_dirs': 'Done. Checkpoints are in work_dirs',
    'coco/bbox_mAP_50 = 0.91': 'coco/bbox_mAP_50 = 0.91',
    '[1/12] a.png: three 53.6 %': '[1/12] a.png: three 53.6 %',
    "error: the config none.py does not exist": "error: the config none.py does not exist",
    f'{STAMP}WARNING - no weights': 'warning: no weights',
    f'{STAMP}ERROR - nothing works': 'error: nothing works',
    f'{STAMP}INFO - Epoch(train) [1][ 25/125]  base_lr: 4.0e-04 lr: 4.0e-04  eta: 0:00:34  '
    'time: 0.14  data_time: 0.0058  memory: 12  grad_norm: 3.2  loss: 2.3  loss_rpn_cls: 0.7  '
    'decode.loss_ce: 1.2  decode.acc_seg: 40.1':
        'Epoch(train) [1][ 25/125]  eta: 0:00:34  loss: 2.3',
    f'{STAMP}INFO - Epoch(val) [2][10/10]    accuracy/top1: 66.3  data_time: 0.02  time: 0.2':
        'Epoch(val) [2][10/10]    accuracy/top1: 66.3',
}


def test_lines(screen):
    assert [line for line in HIDDEN if screen.shown(line) is not None] == []
    assert {line: screen.shown(line) for line in SHOWN} == SHOWN


@pytest.mark.parametrize('code', [0, 3])
def test_all_of_it_is_in_the_file(code, tmp_path, capfd, screen):
    """And the end of it on the screen where the command failed."""
    log = tmp_path / 'made/train.log'
    lines = [*HIDDEN, *SHOWN]
    script = (f'import sys\nprint({chr(10).join(lines)!r})\nprint("last", file=sys.stderr)\n'
              f'sys.exit({code})')
    assert screen.run([sys.executable, '-c', script], tmp_path, log) == code
    assert log.read_text().splitlines() == [*lines, 'last']
    shown = capfd.readouterr().out.splitlines()
    assert shown[:len(SHOWN)] == list(SHOWN.values())
    assert shown[len(SHOWN):] == ([*lines, 'last'][-40:] if code else [])
