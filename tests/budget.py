"""How much time the tests of one family or one op may take: a CI that all of them share stays fast.

A test belongs to a family if it has a parameter ``family``, or one called ``spec`` that has a
``family``; likewise to an op. Their seconds of one core (those of the process and of its children
that have ended, which leaves out waiting) are summed over all processes of pytest-xdist and shown
at the end, with a note if a sum is above its limit. A core shared with other programs takes longer
for the same work (VMamba's tests take 30 s alone and 124 s beside eight others), so only a sum of
several times its limit fails the run. Tests on a GPU, where kernels are compiled, do not count.
"""

import os
import time

import pytest

#: Name of the parameter -> seconds of one core.
LIMITS = {'family': 60.0, 'op': 90.0}
#: How many times a limit fails the run.
SLACK = 3.0


class Budget:
    """A plugin of pytest, for each process of a run; the first one sums and judges."""

    def __init__(self, config, limits=LIMITS, slack=SLACK):
        self.is_worker = hasattr(config, 'workerinput')
        self.limits, self.slack = limits, slack
        self.spent = {}  # (parameter, its value) -> seconds
        self.began = clocks()

    def pytest_collection_finish(self):
        self.began = clocks()  # or the first test of a process would pay for all imports

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        """Attach to a report whose it is and what it took since the one before."""
        report = yield
        now = clocks()
        cpu, wall = (end - begin for end, begin in zip(now, self.began, strict=True))
        # A child counts when it ends, which for a pool of processes, as torch.compile's, may be in
        # another test, much later: a test pays for no more than its own duration.
        report.budget = [*owners(item, self.limits)], min(cpu, wall)
        self.began = now
        return report

    def pytest_runtest_logreport(self, report):
        if not self.is_worker and hasattr(report, 'budget'):
            names, seconds = report.budget
            for owner in map(tuple, names):  # lists, if they come from another process
                self.spent[owner] = self.spent.get(owner, 0.0) + seconds

    def exceeded(self):
        return [owner for owner, seconds in self.spent.items()
                if seconds > self.slack * self.limits[owner[0]]]

    def pytest_sessionfinish(self, session):
        if not self.is_worker and session.exitstatus == 0 and self.exceeded():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.spent:
            return
        failed = self.exceeded()
        terminalreporter.section('seconds of one core, by family and op')
        for owner, seconds in sorted(self.spent.items(), key=lambda item: -item[1]):
            limit = self.limits[owner[0]]
            note = ('' if seconds <= limit else '  over the budget' if owner not in failed else
                    '  FAILED: over the budget')
            terminalreporter.line(f'{seconds:8.1f} of {limit:g}  {" ".join(owner)}{note}',
                                  red=bool(note))


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
