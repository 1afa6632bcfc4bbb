"""Resuming as if the run had never stopped.

mmengine restores weights, optimizer, schedules and counters, but not the random numbers: a resumed
run sees other augmentations and other dropped paths. Here no generator's state has to be saved:
each is seeded again from (seed, iteration, place), so that every draw is a function of where the
run is. Augmentation then depends neither on the number of workers nor of processes.

How this works: before the training starts, :class:`ExactResumeHook` replaces the batch sampler of
the loader by :class:`NumberedBatches` (a loop of epochs) or :class:`EndlessBatches` (a loop of
iterations), which give each index its seed words and skip what was trained on already without
loading it. :class:`vmamba_mm.mm.hooks.data.SampleReader` reads the words in the worker and seeds
python, numpy and torch for that sample alone. The model's draws (drop path, dropout) are seeded by
the hook before each iteration. A loop of iterations has started its iterator when the hook comes;
upstream's has even drawn indices, so its sampler is made anew.

How to test a change: tests/mm/test_exact_resume.py compares the batches of whole and resumed runs,
and tests/tools/test_tools_resume.py kills trainings at any moment and compares their weights, bit
for bit, with those of trainings that were not killed. Both loops, several workers and several
processes matter; so do both lines of mmengine, whose loops differ (``skip_iter`` is onedl's).
"""

from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler

from vmamba_mm.mm.hooks.curves import read_scalars
from vmamba_mm.mm.hooks.data import install_reader, seed_all
from vmamba_mm.registry import HOOKS

MODEL, SAMPLE = 0, 1  # the first seed word tells the two uses apart


class NumberedBatches:
    """A batch sampler whose indices carry their seed words.

    Place k of process r in an iteration is place ``k * world_size + r`` of the whole batch, as
    mmengine's samplers deal samples out.
    """

    def __init__(self, batches, seed):
        self.batches = batches
        self.seed = seed
        self.iteration = 0  # of the next batch
        self.skip = 0  # batches of this epoch that were trained on before the run stopped
        self.rank, self.world_size = get_dist_info()

    def __len__(self):
        return len(self.batches)

    def __getattr__(self, name):
        if name.startswith('__') or name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __iter__(self):
        iteration, skip = self.iteration, self.skip
        for number, batch in enumerate(self.batches):
            if number >= skip:
                yield self.number(batch, iteration + number - skip)

    def number(self, batch, iteration):
        return [(index, (SAMPLE, self.seed, iteration, k * self.world_size + self.rank))
                for k, index in enumerate(batch)]


class EndlessBatches(NumberedBatches):
    """Batches for iteration-based loops: epoch after epoch, from any iteration on, without
    loading the data before it."""

    def __iter__(self):
        stream = self.stream()
        for _ in range(self.iteration):
            next(stream)
        for iteration, batch in enumerate(stream, self.iteration):
            yield self.number(batch, iteration)

    def stream(self):
        sampler = getattr(self.batches, 'sampler', None)
        epoch = 0
        while True:
            if epoch and hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
            yield from self.batches
            epoch += 1


class EndlessIterator:
    """Replaces the loop's iterator, which would load or repeat what was trained on before."""

    def __init__(self, loader, replayed):
        self.loader = loader
        self.replayed = replayed  # calls with which upstream's loop skips by loading
        self.iterator = None

    def __iter__(self):
        return self

    def __next__(self):
        if self.replayed:
            self.replayed -= 1
            return None
        if self.iterator is None:
            self.iterator = iter(self.loader)
        return next(self.iterator)

    def skip_iter(self, num_iters):
        """Called by onedl's loop; the batch sampler starts at the right iteration already."""


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a run that was killed and resumed equal to one that was not, bit for bit on the CPU.

    Works for epoch-based and iteration-based loops and any number of workers. Transforms that
    remember earlier images (mmdet's cached Mosaic) and gradients accumulated over a checkpoint
    are not restored.
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        self.batches = None

    def after_load_checkpoint(self, runner, checkpoint):
        prepare_averages(runner)

    def before_train(self, runner):
        loop = runner.train_loop
        loader = loop.dataloader
        if not install_reader(loader):
            runner.logger.warning('ExactResumeHook: this data loader has no batch sampler, so '
                                  'that its random numbers are not restored on resume')
            return
        eager = getattr(loop, 'dataloader_iterator', None)
        if eager is None:
            self.batches = NumberedBatches(loader.batch_sampler, runner.seed)
        else:
            batches = loader.batch_sampler
            if getattr(eager, '_iterator', None) is not None:
                # Upstream mmengine starts workers when the loop is built, and their read-ahead
                # has used up indices: begin with a fresh sampler.
                batches = rebuild_batches(runner, loader)
                eager._iterator = None
                loader._iterator = None
            self.batches = EndlessBatches(batches, runner.seed)
            self.batches.iteration = loop.iter
            replays = loop.iter if not hasattr(eager, 'skip_iter') else 0
            loop.dataloader_iterator = EndlessIterator(loader, replays)
        # DataLoader forbids to set this by assignment, because its workers would not notice;
        # they have not been started yet.
        vars(loader)['batch_sampler'] = self.batches

    def before_train_epoch(self, runner):
        self.seed(runner)
        if type(self.batches) is NumberedBatches:
            done = runner.iter - runner.epoch * len(self.batches)
            # A checkpoint by iterations may lie within an epoch.
            self.batches.skip = done if 0 < done <= len(self.batches) else 0
            self.batches.iteration = runner.iter

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seed(runner)

    def seed(self, runner):
        seed_all(MODEL, runner.seed, runner.iter, runner.rank)


def prepare_averages(runner):
    """Let an EMAHook make its model before a checkpoint is put into it.

    It does so in ``before_run``, which some runners (mmengine's FlexibleRunner) call after they
    have loaded the checkpoint: the hook would have no model then, or make another one.
    """
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and not hasattr(hook, 'ema_model'):
            hook.before_run(runner)
            hook.before_run = lambda runner: None


def rebuild_batches(runner, loader):
    """A batch sampler like the loader's, with nothing drawn from it yet."""
    cfg = runner.cfg.train_dataloader
    seed = None if runner._randomness_cfg.get('diff_rank_seed') else runner.seed
    sampler = DATA_SAMPLERS.build(cfg.sampler,
                                  default_args=dict(dataset=loader.dataset, seed=seed))
    if cfg.get('batch_sampler') is None:
        return BatchSampler(sampler, loader.batch_size, loader.drop_last)
    return DATA_SAMPLERS.build(cfg.batch_sampler,
                               default_args=dict(sampler=sampler, batch_size=cfg.batch_size))


@HOOKS.register_module()
class MissedValHook(Hook):
    """Runs, on resume, the validation that was due right after the checkpoint and never finished.

    mmengine saves before it validates, and a resumed loop begins with the next training step: a
    run killed in between would lose that result, and perhaps its best checkpoint.
    """

    priority = 'LOWEST'  # after the hooks that prepare themselves in before_train

    def before_train(self, runner):
        loop = runner.train_loop
        if not runner._resume or runner.val_loop is None or not hasattr(loop, 'val_interval'):
            return
        endless = hasattr(loop, 'dataloader_iterator')
        step, last = (loop.iter, loop.max_iters) if endless else (loop.epoch, loop.max_epochs)
        if step < max(loop.val_begin, 1) or (step % loop.val_interval and step != last):
            return
        if not endless and loop.iter != step * len(loop.dataloader):
            return  # a checkpoint within an epoch
        missed = [all(r['step'] not in (loop.iter, loop.epoch)
                      for r in read_scalars(runner.work_dir)[1])]
        broadcast_object_list(missed)
        if missed[0]:
            runner.logger.info('The validation after this checkpoint was not finished: doing it')
            runner.val_loop.run()
