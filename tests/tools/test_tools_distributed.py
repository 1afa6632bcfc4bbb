"""Two processes joined by gloo through dist_train.sh, against one process with the whole batch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch


def command(script, *argv, cwd):
    env = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='',
               PYTHONPATH=os.pathsep.join(
                   [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]))
    return dict(args=['bash', tiny.TOOLS / script, *map(str, argv)], cwd=cwd, env=env, text=True)


def dist(script, *argv, cwd):
    return subprocess.run(**command(script, *argv, cwd=cwd), capture_output=True, timeout=240)


def write_config(tmp_path, name, **kwargs):
    path = tmp_path / f'{name}.py'
    path.write_text(tiny.cls_config(tmp_path / 'data', augment='samples', amp=True, seed=5,
                                    epochs=3, **kwargs) + f"""
custom_imports = dict(imports=['dump_hook'])
custom_hooks = [dict(type='mmengine.DumpHook', folder={str(tmp_path / 'dumped')!r})]
""")
    return path


def test_two_processes(call, tmp_path):
    pytest.importorskip('mmpretrain')
    tiny.make_cls(tmp_path / 'data')
    two = write_config(tmp_path, 'two', batch=2, workers=1)
    done = dist('dist_train.sh', two, 2, '--work-dir', tmp_path / 'two', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'two' / 'epoch_3.pth').is_file()

    one = write_config(tmp_path, 'one', batch=4, workers=0)
    env = {'PYTHONPATH': str(Path(__file__).parent), 'CUDA_VISIBLE_DEVICES': ''}
    code, _, err = call('train.py', one, env=env)
    assert code == 0, err

    def load(name):
        return torch.load(tmp_path / 'dumped' / f'{name}.pt', weights_only=True)

    first, second = load('state_0_of_2'), load('state_1_of_2')
    assert all(torch.equal(first[k], second[k]) for k in first)
    # The samples and their augmentation are those of the one process, so the gradients are too.
    single, double = load('gradients_0_of_1'), load('gradients_0_of_2')
    assert single.keys() == double.keys() and len(single) > 50
    for name, gradient in single.items():
        torch.testing.assert_close(double[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    scale = max(g.abs().max() for g in single.values())
    assert scale > 1e-2

    tested = dist('dist_test.sh', two, tmp_path / 'two' / 'epoch_3.pth', 2, '--work-dir',
                  tmp_path / 'two', '--out', tmp_path / 'metrics.json', cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert 'accuracy/top1' in (tmp_path / 'metrics.json').read_text()


@pytest.mark.parametrize('argv', [['config.py'], ['config.py', 'two'], ['config.py', '0']])
def test_wrong_use(argv, tmp_path):
    done = dist('dist_train.sh', *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert 'CONFIG GPUS' in done.stderr or 'number of GPUs' in done.stderr


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_help(script, tmp_path):
    done = dist(script, '--help', cwd=tmp_path)
    assert done.returncode == 0
    assert script in done.stdout and 'NNODES' in done.stdout


def test_mistake_in_the_input(tmp_path):
    """Each process says what is wrong; the launcher adds no traceback."""
    done = dist('dist_train.sh', 'nothing.py', 2, cwd=tmp_path)
    assert done.returncode == 1
    assert 'the config nothing.py does not exist' in done.stderr
    assert 'Traceback' not in done.stderr
    assert done.stderr.splitlines()[-1].startswith('stopped: process')


def rank_of(process):
    try:
        return process.environ().get('RANK')
    except psutil.Error:
        return None


def test_a_killed_process_ends_the_run_which_resumes(tmp_path):
    pytest.importorskip('mmpretrain')
    tiny.make_cls(tmp_path / 'data')
    config, work_dir = write_config(tmp_path, 'two', batch=2, workers=0), tmp_path / 'two'
    argv = ['dist_train.sh', config, 2, '--work-dir', work_dir, '--resume', 'auto',
            '--cfg-options']
    started = command(*argv, 'train_cfg.max_epochs=500', cwd=tmp_path)
    with subprocess.Popen(**started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        try:
            end = time.monotonic() + 120
            while not (work_dir / 'epoch_2.pth').is_file() and time.monotonic() < end:
                time.sleep(0.05)
            second, = (process for process in psutil.Process(run.pid).children(recursive=True)
                       if rank_of(process) == '1')
            second.send_signal(signal.SIGKILL)
            _, err = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 1
    assert err.splitlines()[-1].startswith('stopped: process 1 was killed by SIGKILL')
    assert '--resume auto' in err

    reached = max(int(path.stem.removeprefix('epoch_')) for path in work_dir.glob('epoch_*.pth'))
    resumed = dist(*argv, f'train_cfg.max_epochs={reached + 1}', cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f'resumed epoch: {reached}' in resumed.stdout
    assert (work_dir / f'epoch_{reached + 1}.pth').is_file()
