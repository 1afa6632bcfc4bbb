"""tests/budget.py on a folder of its own, in one process and in two."""

from pathlib import Path

import pytest

pytest_plugins = ['pytester']
TESTS = Path(__file__).parent
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from budget import Budget

def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU')
    config.pluginmanager.register(Budget(config, dict(family=0.25, op=0.45), slack=2))
"""
FILE = """
import time
from types import SimpleNamespace

import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

@pytest.fixture(scope='module')
def slow_to_make(family):
    work(0.3)

@pytest.mark.parametrize('family', ['large'], scope='module')
def test_with_a_fixture(family, slow_to_make):
    work(0.3)

@pytest.mark.parametrize('op', [SimpleNamespace(name='scan')], ids=['x'])
@pytest.mark.parametrize('spec', [
    SimpleNamespace(family=SimpleNamespace(name='small')),
    pytest.param(SimpleNamespace(family='gpu'), marks=pytest.mark.gpu)])
def test_of_two(spec, op):
    work(0.2)
    time.sleep(0.6)

def test_of_none():
    work(0.6)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """run(file, *options): pytest on it in a process of its own."""
    monkeypatch.delenv('PYTEST_XDIST_WORKER', raising=False)
    monkeypatch.delenv('PYTEST_ADDOPTS', raising=False)
    pytester.makeconftest(CONFTEST)

    def run(file, *options):
        pytester.makepyfile(file)
        return pytester.runpytest_subprocess('-p', 'no:cacheprovider', *options)

    return run


@pytest.mark.parametrize('processes', ['0', '2'])
def test_over_the_budget(run, processes):
    """Fixtures count and waiting does not; a test may be of a family and of an op."""
    found = run(FILE, '-n', processes)
    found.assert_outcomes(passed=4)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stdout.re_match_lines([r' +0\.[67]\d* of 0\.25  family large  FAILED: over the budget',
                                 r' +0\.[23]\d* of 0\.(25|45)  (op scan|family small)',
                                 r' +0\.[23]\d* of 0\.(25|45)  (op scan|family small)'])
    assert 'family gpu' not in found.stdout.str()


def test_within_the_budget(run):
    """Nothing is shown where no test is of a family or an op."""
    found = run('def test(): pass')
    assert found.ret == 0 and 'seconds of one core' not in found.stdout.str()
    found = run("import pytest\n\n@pytest.mark.parametrize('op', ['a'])\ndef test(op): pass")
    assert found.ret == 0 and '0.0 of 0.45  op a' in found.stdout.str()
