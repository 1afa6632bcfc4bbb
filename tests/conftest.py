"""Shared by all tests. Nothing heavy happens before a test asks for it."""
import logging
import os
from pathlib import Path

import pytest
from running import call, forkserver, start  # noqa: F401 (fixtures)

# Read when torch loads: the tests are small, and more threads than cores only slow them down.
os.environ.setdefault('OMP_NUM_THREADS', str(min(2, os.cpu_count() or 1)))

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def mm():
    """Make the installed mm* packages usable; a test that reads a config asks for this."""
    from vmamba_mm.compat import prepare_mm
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
