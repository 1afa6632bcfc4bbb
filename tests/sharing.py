"""What several processes of tests (pytest-xdist) have between them."""
import fcntl
from contextlib import contextmanager


@contextmanager
def shared_or_alone(folder, alone):
    """Hold a lock with everybody, or alone. A gate keeps those who come later behind who waits."""
    with open(folder / 'gate.lock', 'w') as gate, open(folder / 'tests.lock', 'w') as tests:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:  # a process forked in between has the file too: closing it here frees nothing
            fcntl.flock(tests, fcntl.LOCK_UN)
