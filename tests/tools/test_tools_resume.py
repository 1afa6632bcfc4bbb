"""A training killed at any step and resumed equals one that was never stopped, bit for bit."""

import json
import os
import signal

import pytest
import tiny
import torch

from vmamba_mm.mm.hooks.curves import read_scalars

TIMES = {'time', 'data_time'}


def records_of(work_dir):
    """Every logged number but the times, by step: training and validation of all starts."""
    train, val = read_scalars(work_dir)
    def strip(r):
        return {k: v for k, v in r.items() if k not in TIMES}
    return [strip(r) for r in train], [strip(r) for r in val]


def logged_steps(work_dir):
    steps = []
    for path in work_dir.glob('*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            if line.endswith('}') and 'loss' in line:
                steps.append(json.loads(line)['step'])
    return steps


def load(path):
    from vmamba_mm.mm.compat import prepare_mm
    prepare_mm()
    return torch.load(path, weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def kill_and_resume(start, config, tmp_path, kill_after, options):
    """Kill a run once ``kill_after`` steps are logged and resume it; returns its work dir."""
    work_dir = tmp_path / 'killed'
    argv = ['train.py', config, '--work-dir', work_dir]
    options = ['--cfg-options', *options] if options else []
    run = start(*argv, *options)
    run.wait_for(lambda: max(logged_steps(work_dir), default=0) >= kill_after)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.join()
    assert run.process.exitcode == -signal.SIGKILL
    resumed = start(*argv, '--resume', 'auto', *options)
    assert resumed.wait() == 0, resumed.err
    first = int(next(line for line in resumed.out.splitlines() if 'resumed epoch:' in line)
                .rpartition(':')[2])
    assert 0 < first <= kill_after + 3
    return work_dir


@pytest.mark.parametrize(('task', 'workers', 'options', 'last'), [
    ('cls', 2, [], 'epoch_4.pth'),
    # Checkpoints within epochs of three steps, and at their last step.
    ('cls', 0, ['default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=2'],
     'iter_12.pth'),
    ('seg', 0, [], 'iter_10.pth'),
    ('seg', 2, [], 'iter_10.pth'),
], ids=['epochs', 'epochs-saved-by-iterations', 'iterations', 'iterations-workers'])
def test_kill_and_resume(task, workers, options, last, start, tmp_path):
    make, config = {'cls': (tiny.make_cls, tiny.cls_config),
                    'seg': (tiny.make_seg, tiny.seg_config)}[task]
    make(tmp_path / 'data')
    path = tmp_path / 'config.py'
    path.write_text(config(tmp_path / 'data', workers=workers))
    killed = kill_and_resume(start, path, tmp_path, 7 if task == 'cls' else 5, options)
    ours = load(killed / last)

    # The config has no seed: the one drawn at the start was kept.
    assert isinstance(ours['meta']['seed'], int)
    straight = tmp_path / 'straight'
    run = start('train.py', path, '--work-dir', straight, '--cfg-options',
                f'randomness.seed={ours["meta"]["seed"]}', *options)
    assert run.wait() == 0, run.err
    theirs = load(straight / last)

    train, val = records_of(killed)
    expected_train, expected_val = records_of(straight)
    assert [r['step'] for r in train] == list(range(1, 13 if task == 'cls' else 11))
    assert train == expected_train
    assert val == expected_val
    assert len({r['loss'] for r in train}) == len(train)
    for part in ('state_dict', 'optimizer', 'param_schedulers', 'ema_state_dict'):
        assert (part in ours) == (part in theirs)
        if part in ours:
            assert equal(ours[part], theirs[part]), part
    assert (killed / 'curves.png').stat().st_size > 1000


@pytest.mark.parametrize('begin', [0, 3])
def test_resume_by_a_runner_that_loads_before_its_hooks_begin(begin, start, tmp_path):
    """mmengine's FlexibleRunner, with a moving average that begins after the checkpoint or not."""
    tiny.make_cls(tmp_path / 'data', per_class=3)
    path = tmp_path / 'config.py'
    path.write_text(tiny.cls_config(tmp_path / 'data', workers=0, epochs=3))
    options = ['--cfg-options', 'runner_type=FlexibleRunner', 'randomness.seed=1',
               f"custom_hooks=[dict(type='mmengine.EMAHook', begin_epoch={begin})]"]
    run = start('train.py', path, '--work-dir', tmp_path / 'a', *options)
    assert run.wait() == 0, run.err
    run = start('train.py', path, '--work-dir', tmp_path / 'b', '--resume',
                tmp_path / 'a' / 'epoch_2.pth', *options)
    assert run.wait() == 0, run.err
    straight, resumed = (load(tmp_path / name / 'epoch_3.pth') for name in 'ab')
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert equal(straight[part], resumed[part]), part
