"""A sign of life between mmengine's log lines."""

import datetime
import logging
import time

from mmengine.hooks import Hook

from vmamba_mm.registry import HOOKS


class _Clock(logging.Handler):
    """Remembers when the last line was logged."""

    def __init__(self):
        super().__init__()
        self.time = time.monotonic()

    def emit(self, record):
        self.time = time.monotonic()


@HOOKS.register_module()
class ProgressHook(Hook):
    """Log one line with the time left when nothing has been logged for ``seconds``.

    LoggerHook counts iterations (often 50 or 100), which on a CPU can take many minutes.
    """

    priority = 'LOWEST'

    def __init__(self, seconds=20):
        self.seconds = seconds
        self.clock = _Clock()
        self.start = {}

    def before_run(self, runner):
        if self.clock not in runner.logger.handlers:
            runner.logger.addHandler(self.clock)

    def _start_timer(self, runner, mode):
        self.start[mode] = (time.monotonic(), runner.iter if mode == 'train' else 0)

    def _after(self, runner, mode, done, total):
        if runner.rank or time.monotonic() - self.clock.time < self.seconds:
            return
        started, first = self.start[mode]
        speed = (time.monotonic() - started) / max(done - first, 1)
        left = datetime.timedelta(seconds=int(speed * (total - done)))
        runner.logger.info(f'{mode} [{done}/{total}]  {speed:.2f} s per iteration, '
                           f'about {left} left')

    def before_train(self, runner):
        self._start_timer(runner, 'train')

    def before_val_epoch(self, runner):
        self._start_timer(runner, 'val')

    def before_test_epoch(self, runner):
        self._start_timer(runner, 'test')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._after(runner, 'train', runner.iter + 1, runner.max_iters)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._after(runner, 'val', batch_idx + 1, len(runner.val_dataloader))

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._after(runner, 'test', batch_idx + 1, len(runner.test_dataloader))
