"""How much time the tests of one family or one op may take: a CI that all of them share stays fast.

A test belongs to a family if it has a parameter ``family``, or one called ``spec`` that has a
``family``; likewise to an op. Their seconds of one core (those of the process and of its children
that have ended, which leaves out waiting) are summed over all processes of pytest-xdist and shown
at the end; a sum above its limit fails the run. Tests on a GPU, where kernels are compiled, do not
count.

The seconds are those of a core of the machine that the limits were set on, with nothing else to do.
A slower core, or one that is shared with other programs, takes longer for the same tests. How much
longer is measured in between, by a small piece of work that is always the same (``work``), and what
a test took is divided by it.
"""

import collections
import copy
import functools
import gc
import os
import statistics
import time

import pytest

#: Name of the parameter -> seconds of one core.
LIMITS = {'family': 60.0, 'op': 90.0}
#: Seconds that ``work`` takes there between tests (2.6 GHz of an AMD EPYC of 2024, Python 3.11,
#: torch 2.14). With it VMamba's tests come to the 26 s that they take by themselves, in a run of
#: all tests, too, where 57 s were measured.
USUAL = 0.0053
#: Seconds between two measurements, and how many of the latest the slow-down is the median of.
EVERY, LATEST = 1.0, 5


@functools.cache
def network():
    """A small network, its graph, and an input."""
    import torch
    from torch import fx, nn
    with torch.random.fork_rng(devices=()):  # tests may count on the numbers that come next
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 14, 14]), nn.GELU(), nn.Flatten(),
                            nn.Linear(8 * 14 * 14, 16), nn.ReLU(), nn.Linear(16, 4))
    return net, fx.symbolic_trace(net), torch.ones(2, 3, 16, 16)


def work():
    """Much code and little of each, as in tests: what fits the caches of a core, such as a loop of
    a few lines or a large matrix product, is not slowed down by others as they are. Nor does it
    depend on what is imported, as tracing does."""
    net, graph, x = network()
    for _ in range(4):
        net(x).sum().backward()
    for _ in range(2):
        copy.deepcopy(graph)


class Budget:
    """A plugin of pytest, for each process of a run; the first one sums and judges.

    Args:
        config: of pytest.
        limits: parameter -> seconds.
        work, usual: what is measured, and how many seconds it takes on a core to itself.
    """

    def __init__(self, config, limits=LIMITS, work=work, usual=USUAL):
        self.is_worker = hasattr(config, 'workerinput')
        self.limits, self.work, self.usual = limits, work, usual
        self.spent = {}  # (parameter, its value) -> [seconds, those that were measured]
        self.timings = collections.deque(maxlen=LATEST)
        self.timed, self.began = -EVERY, clocks()

    def pytest_collection_finish(self):
        self.began = clocks()  # or the first test of a process would pay for all imports

    def time_work(self):
        if not self.timings:
            self.work()  # what it imports does not count
        collects = gc.isenabled()
        gc.disable()
        start = time.thread_time()
        self.work()
        self.timings.append(time.thread_time() - start)
        if collects:
            gc.enable()
        self.timed = time.monotonic()

    def slowdown(self):
        """How many times longer than usual anything takes now."""
        return statistics.median(self.timings) / self.usual

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Attach to a test's last report whose it is and what it took since that of the one before.
        """
        report = yield
        if call.when == 'teardown':
            cpu, wall = (end - begin for end, begin in zip(clocks(), self.began, strict=True))
            # A child counts when it ends, which for a pool of processes, as torch.compile's, may be
            # in another test, much later: a test pays for no more than its own duration.
            measured = min(cpu, wall)
            if time.monotonic() - self.timed >= EVERY:
                self.time_work()  # nothing that a test has patched is left now
            report.budget = [*owners(item, self.limits)], (measured / self.slowdown(), measured)
            self.began = clocks()
        return report

    def pytest_runtest_logreport(self, report):
        if not self.is_worker and hasattr(report, 'budget'):
            names, seconds = report.budget
            for owner in map(tuple, names):  # lists, if they come from another process
                self.spent[owner] = [*map(sum, zip(self.spent.get(owner, (0, 0)), seconds,
                                                   strict=True))]

    def exceeded(self):
        return [owner for owner, (seconds, _) in self.spent.items()
                if seconds > self.limits[owner[0]]]

    def pytest_sessionfinish(self, session):
        if not self.is_worker and session.exitstatus == 0 and self.exceeded():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.spent:
            return
        failed = self.exceeded()
        terminalreporter.section('seconds of one core to itself, by family and op')
        for owner, (seconds, measured) in sorted(self.spent.items(), key=lambda item: -item[1][0]):
            note = '  FAILED: over the budget' if owner in failed else ''
            terminalreporter.line(f'{seconds:8.1f} of {self.limits[owner[0]]:g}  {" ".join(owner)} '
                                  f'({measured:.1f} here){note}', red=bool(note))


def owners(item, parameters):
    """(parameter, name of its value) for each that a test has, unless it runs on a GPU."""
    callspec = getattr(item, 'callspec', None)
    if callspec is None or item.get_closest_marker('gpu'):
        return
    for name in parameters:
        value = callspec.params.get(name) or getattr(callspec.params.get('spec'), name, None)
        if value is not None:
            yield name, value if isinstance(value, str) else getattr(value, 'name', str(value))


def clocks():
    """Seconds of the processor and of the wall."""
    return sum(os.times()[:4]), time.monotonic()
