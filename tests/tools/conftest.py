import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import tiny

HERE = Path(__file__).resolve().parent


def _child(tool, argv, cwd, out, env, max_file_size):
    """In the forked process: what ``python tools/<tool> <argv>`` would do."""
    import resource
    import runpy

    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    os.environ.update(env)
    os.chdir(cwd)
    for stream, fd in ((f'{out}.out', 1), (f'{out}.err', 2)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.path.insert(0, str(tiny.TOOLS))
    sys.argv = [tool, *argv]
    runpy.run_path(str(tiny.TOOLS / tool), run_name='__main__')


class Running:
    """A tool that runs in its own process."""

    def __init__(self, process, out):
        self.process = process
        self._out = out

    @property
    def out(self):
        return Path(f'{self._out}.out').read_text()

    @property
    def err(self):
        return Path(f'{self._out}.err').read_text()

    def wait(self, timeout=240):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f'still running after {timeout} s:\n{self.out[-2000:]}')
        return self.process.exitcode

    def wait_for(self, ready, timeout=120):
        """Until ``ready()`` holds; the process must not end before."""
        end = time.monotonic() + timeout
        while not ready():
            if not self.process.is_alive() or time.monotonic() > end:
                pytest.fail(f'ended early or hung:\n{self.out[-1500:]}\n{self.err[-1500:]}')
            time.sleep(0.01)


@pytest.fixture(scope='session')
def forkserver():
    """Starting a tool takes 10 s, nearly all of it imports: they are done once, in a server."""
    pytest.importorskip('mmpretrain')
    os.environ['PYTHONPATH'] = os.pathsep.join(
        p for p in (str(HERE), os.environ.get('PYTHONPATH')) if p)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preload'])
    return context


@pytest.fixture
def start(forkserver, tmp_path):
    """start(tool, *argv, env={...}) -> Running, in a fresh current folder.

    ``max_file_size``: writing more than these bytes to a file fails.
    """
    started = []

    def start(tool, *argv, env=None, max_file_size=None):
        out = tmp_path / f'log{len(started)}'
        process = forkserver.Process(
            target=_child, args=(tool, [str(a) for a in argv], str(tmp_path), str(out),
                                 {'OMP_NUM_THREADS': '1', **(env or {})}, max_file_size))
        process.start()
        started.append(Running(process, out))
        return started[-1]

    yield start
    for running in started:
        if running.process.is_alive():
            running.process.kill()
            running.process.join()


@pytest.fixture
def call(start):
    """Like start, but waits; returns (exit code, stdout, stderr)."""

    def call(tool, *argv, **kwargs):
        running = start(tool, *argv, **kwargs)
        return running.wait(), running.out, running.err

    return call


@pytest.fixture(scope='session')
def projects(forkserver, tmp_path_factory):
    """task -> (config, checkpoint with random weights, folder of images), made when asked for."""
    made = {}

    def project(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            made[task] = _make_project(task, folder)
        return made[task]

    return project


def _make_project(task, folder):
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from vmamba_mm.compat import prepare_mm

    prepare_mm()
    make, write, images = {
        'cls': (tiny.make_cls, tiny.cls_config, 'val/red'),
        'det': (tiny.make_det, tiny.det_config, 'images'),
        'seg': (tiny.make_seg, tiny.seg_config, 'images/validation')}[task]
    data = folder / 'data'
    data.mkdir()
    make(data)
    config = folder / 'config.py'
    config.write_text(write(data))
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    checkpoint = folder / 'model.pth'
    meta = dict(dataset_meta=dict(classes=('blue', 'red'))) if task == 'cls' else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return config, checkpoint, data / images
