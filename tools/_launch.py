"""torchrun for dist_train.sh and dist_test.sh, ending with one line instead of its traceback.

A process that fails has printed its own message, or its own traceback, already.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        print(f'stopped: process {rank} ended with exit code {failure.exitcode}; its message is '
              'above', file=sys.stderr)
        sys.exit(1)
