"""A Python that has transformers, for tests: this one, or that of ``make setup-transformers``."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OWN = REPO / '.venv-transformers/bin/python'


def run_step(folder: Path, step: str):
    """What a step of tests/transformers_by_command.py returns."""
    python = sys.executable if importlib.util.find_spec('transformers') else str(OWN)
    if not Path(python).is_file():
        pytest.skip('transformers is neither here nor in .venv-transformers: make '
                    'setup-transformers')
    # One process for each thing, since the tests around use the cores.
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get('PYTHONPATH'))))
    done = subprocess.run(
        [python, REPO / 'tests/transformers_by_command.py', folder, step], cwd=folder,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'), stdin=subprocess.DEVNULL,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
