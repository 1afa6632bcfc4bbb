"""tests/budget.py on a folder of its own, in one process and in two."""

import time
from pathlib import Path
from types import SimpleNamespace

import budget
import pytest

pytest_plugins = ['pytester']
TESTS = Path(__file__).parent
CONFTEST = f"""
import os
import sys
import time
sys.path.insert(0, {str(TESTS)!r})
from budget import Budget

def work():
    end = time.thread_time() + 0.002 * float(os.environ['SLOWDOWN'])
    while time.thread_time() < end:
        pass

def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a GPU')
    config.pluginmanager.register(Budget(config, dict(family=0.5, op=0.45), work, usual=0.002))
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

    def run(file, *options, slowdown=1):
        monkeypatch.setenv('SLOWDOWN', str(slowdown))
        pytester.makepyfile(file)
        return pytester.runpytest_subprocess('-p', 'no:cacheprovider', *options)

    return run


@pytest.mark.parametrize('processes', ['0', '2'])
def test_over_the_budget(run, processes):
    """Fixtures count and waiting does not; a test may be of a family and of an op."""
    found = run(FILE, '-n', processes)
    found.assert_outcomes(passed=4)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    small = r' +0\.[23] of 0\.(5|45)  (op scan|family small) \(0\.[23] here\)$'
    found.stdout.re_match_lines([
        r' +0\.[67] of 0\.5  family large \(0\.[67] here\)  FAILED: over the budget', small, small])
    assert 'family gpu' not in found.stdout.str()


@pytest.mark.parametrize('processes', ['0', '2'])
def test_on_a_slow_core(run, processes):
    """The same tests where all takes twice as long as it should."""
    found = run(FILE, '-n', processes, slowdown=2)
    assert found.ret == 0
    small = r' +0\.1 of 0\.(5|45)  (op scan|family small) \(0\.[23] here\)$'
    found.stdout.re_match_lines([
        r' +0\.3 of 0\.5  family large \(0\.[67] here\)$', small, small])


def test_slowdown_is_that_of_most_of_the_latest_measurements(monkeypatch):
    seconds, clock = iter([99, 2, 2, 18, 2, 2, 6, 6, 18, 18, 18]), [0.0]

    def work():
        clock[0] += next(seconds)

    plugin = budget.Budget(SimpleNamespace(), work=work, usual=4.0)
    monkeypatch.setattr(time, 'thread_time', lambda: clock[0])
    slowdowns = []  # the very first call, which may import much, does not count
    for _ in range(10):
        plugin.time_work()
        slowdowns.append(plugin.slowdown())
    assert slowdowns[4:] == [0.5, 0.5, 1.5, 1.5, 1.5, 4.5]


def test_work_is_short():
    """A second of tests may cost no more than a few hundredths for the measurement."""
    budget.work()
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        budget.work()
        seconds.append(time.thread_time() - start)
    assert 1e-4 < min(seconds) < 0.05


def test_within_the_budget(run):
    """Nothing is shown where no test is of a family or an op."""
    found = run('def test(): pass')
    assert found.ret == 0 and 'seconds of one core' not in found.stdout.str()
    found = run("import pytest\n\n@pytest.mark.parametrize('op', ['a'])\ndef test(op): pass")
    assert found.ret == 0 and '0.0 of 0.45  op a (0.0 here)' in found.stdout.str()
