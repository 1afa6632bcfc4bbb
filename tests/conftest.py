"""Shared by all tests. Nothing heavy happens before a test asks for it."""
import gc
import logging
import os
from pathlib import Path

import pytest
from budget import Budget
from leaves import build_meta, load  # noqa: F401 (fixtures)
from running import call, forkserver, load_tool, start  # noqa: F401 (fixtures)
from sharing import shared_or_alone

# Read when torch loads: the tests are small, and more threads than cores only slow them down.
# The variable of pytest-xdist says that this is one of several processes.
threads = 1 if 'PYTEST_XDIST_WORKER' in os.environ else min(2, os.cpu_count() or 1)
os.environ.setdefault('OMP_NUM_THREADS', str(threads))

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent


#: Marker -> what the path of a test below tests/ has in it: a CI of several jobs splits by these.
MARKED_PATHS = {'tools': ('tools/', 'demo/'), 'zoo': ('zoo',), 'timm': ('timm',),
                'compile': ('compile',)}


def pytest_configure(config):
    config.pluginmanager.register(Budget(config))


# --- tests that need a GPU, and tests that must be alone ----------------------------------------

def pytest_collection_modifyitems(items):
    """``gpu`` for every test whose parameter ``device`` is 'cuda': ``-m gpu`` selects those too."""
    for item in items:
        path = Path(os.path.relpath(item.path, TESTS)).as_posix()
        for marker, parts in MARKED_PATHS.items():
            if any(part in path for part in parts):
                item.add_marker(marker)
        on_gpu = getattr(item, 'callspec', None) and item.callspec.params.get('device') == 'cuda'
        if on_gpu and not item.get_closest_marker('gpu'):
            item.add_marker('gpu')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for marker in item.iter_markers('gpu'):
        reason = why_no_gpu(**marker.kwargs)
        if reason:
            pytest.skip(reason)


def why_no_gpu(nvidia=False, count=1):
    """What is missing here for a test marked ``gpu(...)``, or None."""
    import torch
    if torch.cuda.device_count() < count:
        return f'needs {count} GPUs' if count > 1 else 'needs a GPU'
    return 'needs an NVIDIA GPU' if nvidia and torch.version.hip is not None else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Processes for ``-n auto``: bounded by cores and memory, a GPU's with ``-m gpu``."""
    import psutil
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    marks = config.option.markexpr
    if 'gpu' not in marks or 'not gpu' in marks:  # see make test-gpu
        return max(1, min(cores, psutil.virtual_memory().total // (4 << 30), 8))
    import torch
    if not torch.cuda.is_available():
        return 1
    # A core for each test's Python; the rest compiles kernels.
    return max(1, min(cores * 3 // 4, torch.cuda.mem_get_info()[1] // (6 << 30), 20))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Among several processes a test marked ``alone`` waits for the others', and they for it."""
    if not hasattr(item.config, 'workerinput'):
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent  # shared by the processes
    with shared_or_alone(folder, bool(item.get_closest_marker('alone'))):
        return (yield)


@pytest.fixture(scope='module', autouse=True)
def collect_what_is_new():
    """The garbage collector looks only at objects that are younger than the file of the test.

    A full collection takes 0.4 s once mm* and torch.compile are imported, mmengine asks for one for
    each data set, and Python makes its own in between: together a quarter of all the time.
    """
    gc.collect()
    gc.freeze()


# --- mm* ----------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def mm():
    """Make the installed mm* packages usable; a test that reads a config asks for this."""
    from vmamba_mm.mm.compat import prepare_mm
    prepare_mm()


@pytest.fixture(scope='session')
def read_config(mm):
    """Config.fromfile on a path below the repository (or anywhere), its default scope active."""
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    def read(path):
        cfg = Config.fromfile(REPO / path)
        init_default_scope(cfg.default_scope)
        # mmengine prints a line per parameter group.
        MMLogger.get_current_instance().setLevel(logging.WARNING)
        return cfg

    return read
