"""The marks of tests/conftest.py: ``gpu`` is the only way to ask for a GPU, ``alone`` is alone."""
import re
import threading
from pathlib import Path

from sharing import shared_or_alone

TESTS = Path(__file__).parent


def test_a_gpu_is_asked_for_by_the_mark_alone():
    """Else ``-m gpu`` (make test-gpu) would leave a test out: no skip of its own, in any file."""
    asks = re.compile(r'skip(if)?\([^)]*cuda\.(is_available|device_count)'
                      r'|cuda\.(is_available|device_count)\(\)[^\n]*:\n\s+pytest\.skip')
    wrong = [str(path.relative_to(TESTS)) for path in TESTS.rglob('test_*.py')
             if path != Path(__file__) and asks.search(path.read_text())
             and path.name != 'test_gpu_tools.py']  # has tests for machines without one
    assert wrong == []


def test_parameters_that_are_a_gpu_are_marked(request):
    """Of the tests that were collected beside this one."""
    for item in request.session.items:
        params = getattr(getattr(item, 'callspec', None), 'params', {})
        if 'cuda' in (params.get('device'), params.get('kernels')):
            assert item.get_closest_marker('gpu'), item.nodeid


def test_alone(tmp_path):
    """Two tests at once; one that must be alone waits for both; a fourth waits for that one."""
    log, entered = [], threading.Barrier(3)
    first_two_may_end = threading.Event()

    def share(name):
        with shared_or_alone(tmp_path, alone=False):
            log.append(f'{name} begins')
            entered.wait(10)  # both hold it at the same time
            first_two_may_end.wait(10)
            log.append(f'{name} ends')

    def be_alone():
        with shared_or_alone(tmp_path, alone=True):
            log.append('alone begins')
            log.append('alone ends')

    def come_later():
        with shared_or_alone(tmp_path, alone=False):
            log.append('later')

    threads = [threading.Thread(target=share, args=(name,)) for name in 'ab']
    for thread in threads:
        thread.start()
    entered.wait(10)
    threads += [threading.Thread(target=be_alone), threading.Thread(target=come_later)]
    threads[2].start()
    threads[2].join(0.2)
    threads[3].start()
    threads[3].join(0.2)
    assert sorted(log) == ['a begins', 'b begins']
    first_two_may_end.set()
    for thread in threads:
        thread.join(10)
    assert sorted(log[2:4]) == ['a ends', 'b ends']
    assert log[4:] == ['alone begins', 'alone ends', 'later']
