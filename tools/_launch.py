"""torchrun for dist_train.sh and dist_test.sh, ending with one line instead of its traceback.

A process that fails has printed its own message, or its own traceback, already.
"""

import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def describe(rank, exitcode):
    """One line on how the process that failed first has ended."""
    if exitcode >= 0:
        return f'process {rank} ended with exit code {exitcode}; its message is above'
    name = signal.Signals(-exitcode).name
    hint = ', as the system does when memory runs out' if name == 'SIGKILL' else ''
    return (f'process {rank} was killed by {name}{hint}; the others were stopped. The same command '
            'with --resume auto continues a training from its last checkpoint')


if __name__ == '__main__':
    try:
        main()
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        print(f'stopped: {describe(rank, failure.exitcode)}', file=sys.stderr)
        sys.exit(1)
