"""What changes batches of pairs while a network of restoration trains."""

from collections.abc import Sequence

import numpy as np
from mmengine.hooks import Hook

from vmamba_mm.registry import HOOKS


@HOOKS.register_module()
class ProgressivePatches(Hook):
    """Smaller patches and more of them at first, as Restormer trains (arXiv 2111.09881).

    The data set gives the largest patches and the data loader the largest batch; of these, a part
    is taken.

    Args:
        iters: of each step; the last one goes on.
        batch_sizes, patch_sizes: of each step, of one process; ``patch_sizes`` are of the good
            images.
        scale: how many times as large these are.

    Raises:
        ValueError: if there are not as many of each.
    """

    def __init__(self, iters: Sequence[int], batch_sizes: Sequence[int],
                 patch_sizes: Sequence[int], scale: int = 1):
        if not len(iters) == len(batch_sizes) == len(patch_sizes) > 0:
            raise ValueError('iters, batch_sizes and patch_sizes must have an entry for each step')
        self.ends = np.cumsum(iters)
        self.batch_sizes, self.patch_sizes, self.scale = batch_sizes, patch_sizes, scale

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        step = min(int(np.searchsorted(self.ends, runner.iter, side='right')), len(self.ends) - 1)
        count, size = self.batch_sizes[step], self.patch_sizes[step] // self.scale
        data_batch['inputs'] = list(data_batch['inputs'][:count])
        data_batch['data_samples'] = data_batch['data_samples'][:count]
        for i, (image, sample) in enumerate(zip(data_batch['inputs'], data_batch['data_samples'],
                                                strict=True)):
            y, x = (np.random.randint(side - size + 1) for side in image.shape[1:])
            data_batch['inputs'][i] = image[:, y:y + size, x:x + size]
            sample.gt = sample.gt[:, self.scale * y:self.scale * (y + size),
                                  self.scale * x:self.scale * (x + size)]


@HOOKS.register_module()
class MixPairs(Hook):
    """Each pair of a batch blended with another one, degraded image and good one alike (mixup,
    arXiv 1710.09412).

    Args:
        beta: both parameters of the distribution of the share.
        prob: how often a batch is mixed; the others stay as they are.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, beta: float, prob: float = 1.0):
        if not beta > 0:
            raise ValueError(f'beta must be above 0, got {beta!r}')
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be in [0, 1], got {prob!r}')
        self.beta, self.prob = beta, prob

    def before_train_iter(self, runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if np.random.rand() >= self.prob:
            return
        share = float(np.random.beta(self.beta, self.beta))
        samples, inputs = data_batch['data_samples'], list(data_batch['inputs'])
        targets, order = [sample.gt for sample in samples], np.random.permutation(len(inputs))
        for i, other in enumerate(order):
            data_batch['inputs'][i] = share * inputs[i] + (1 - share) * inputs[other]
            samples[i].gt = share * targets[i] + (1 - share) * targets[other]
