"""Checkpoints that are complete or absent, and the search for the newest complete one.

How this works: :class:`AtomicCheckpointHook` writes through :func:`vmamba_mm.atomic.write_atomic`,
and collects what mmengine's hook wants to remove until the new file is complete. It overrides
``_save_checkpoint_with_step``, which mmengine does not document: compare it with that of a new
mmengine.

How to test a change: tests/tools/test_tools_resume.py, which kills trainings while they save.
"""

import os
import re
import zipfile
from pathlib import Path

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook

from vmamba_mm.atomic import TEMP_SUFFIX, write_atomic
from vmamba_mm.registry import HOOKS


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, with writes that are never seen half done."""

    def put(self, obj, filepath):
        write_atomic(obj, filepath)


class _DeferredRemoval:
    """A file backend that removes nothing until ``flush``, when the new checkpoint is complete."""

    def __init__(self, backend):
        self._backend = backend
        self._pending = []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path):
        self._pending.append((self._backend.remove, path))

    def rmtree(self, path):
        self._pending.append((self._backend.rmtree, path))

    def flush(self, keep=()):
        pending, self._pending = self._pending, []
        for remove, path in pending:
            if path not in keep and os.path.exists(path):
                remove(path)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook; a kill at any moment leaves a complete checkpoint behind.

    Files appear under their name only when complete, old ones go only after that, and
    ``last_checkpoint`` is replaced in between.
    """

    def before_train(self, runner):
        if os.path.isdir(runner.work_dir) and is_main_process():
            for temp in Path(runner.work_dir).glob(f'.*{TEMP_SUFFIX}'):
                temp.unlink(missing_ok=True)
        register_backend('local', AtomicLocalBackend, force=True, prefixes='')
        super().before_train(runner)
        self.file_backend = _DeferredRemoval(self.file_backend)

    def _save_checkpoint_with_step(self, runner, step, meta):
        name = self.filename_tmpl.format(step)
        path = self.file_backend.join_path(self.out_dir, name)
        outdated = []
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = [self.keep_ckpt_ids.popleft()]
            self.keep_ckpt_ids.append(step)
            # The outdated one is still listed in the file: if the process dies before it is
            # removed, mmengine removes it when the run is resumed.
            runner.message_hub.update_info('keep_ckpt_ids', outdated + list(self.keep_ckpt_ids))
        self.last_ckpt = path
        runner.message_hub.update_info('last_ckpt', path)
        runner.save_checkpoint(
            self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
            backend_args=self.backend_args, **self.args)
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        if not is_main_process():
            return
        write_atomic(path.encode(), os.path.join(runner.work_dir, 'last_checkpoint'))
        for old in outdated:
            old = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(old):
                self.file_backend.remove(old)
            elif self.file_backend.isdir(old):
                self.file_backend.rmtree(old)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner, metrics):
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    @master_only
    def _remove_outdated(self):
        best = getattr(self, 'best_ckpt_path_dict', {})
        self.file_backend.flush(
            keep=(self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best.values()))


def is_complete(path):
    """Whether a checkpoint file is whole: a zip whose every member has its checksum."""
    try:
        with zipfile.ZipFile(path) as f:
            return f.testzip() is None
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError):
        return False


def find_resumable(work_dir, warn=print):
    """The newest complete checkpoint of a run, or None for a run without any.

    ``last_checkpoint`` is tried first; a run stopped by a tool that does not write atomically may
    have left it pointing at half a file.
    """
    work_dir = Path(work_dir)
    candidates = []
    pointer = work_dir / 'last_checkpoint'
    if pointer.is_file():
        named = pointer.read_text().strip()
        if named:
            candidates.append(Path(named))
            candidates.append(work_dir / Path(named).name)  # the work dir was moved
    steps = [(int(m[1]), p) for p in work_dir.glob('*.pth')
             if (m := re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', p.name))]
    candidates += [p for _, p in sorted(steps, reverse=True)]
    for path in dict.fromkeys(candidates):
        if not path.is_file():
            continue
        if is_complete(path):
            return str(path)
        warn(f'ignoring {path}: it is not complete (the process that wrote it was stopped)')
    return None
