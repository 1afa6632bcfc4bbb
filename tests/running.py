"""Fixtures that run the tools as a user does, each in a process of its own, or import them.

A module rather than a conftest: a forked process finds its function by the module's name, which
must be one of a kind.
"""

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / 'tools'


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
    sys.path.insert(0, str((TOOLS / tool).parent))
    sys.argv = [tool, *argv]
    runpy.run_path(str(TOOLS / tool), run_name='__main__')


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

    def wait(self, timeout=600):
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
        p for p in (str(HERE / 'tools'), os.environ.get('PYTHONPATH')) if p)
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


@contextlib.contextmanager
def loading_tools():
    """A function load('analysis/erf.py'): the script as a module, its folder on sys.path as when
    it runs. Afterwards the modules of all tools are forgotten: some are called alike.
    """
    before = list(sys.path)

    def load(name):
        path = TOOLS / name
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        return importlib.import_module(path.stem)

    try:
        yield load
    finally:
        sys.path[:] = before
        for name, module in list(sys.modules.items()):
            if TOOLS in Path(getattr(module, '__file__', None) or '/').parents:
                del sys.modules[name]


@pytest.fixture
def load_tool():
    with loading_tools() as load:
        yield load
