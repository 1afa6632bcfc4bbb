"""MESA: an averaged model teaches the one that is trained (arXiv 2205.14083)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.mm.wrappers import unwrapped
from vmamba_mm.registry import HOOKS


def soft_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """The mean cross-entropy of logits (B, classes) and the softmax of ``wanted``, in fp32."""
    return -(F.softmax(wanted.float(), -1) * F.log_softmax(logits.float(), -1)).sum(-1).mean()


@HOOKS.register_module()
class MESAHook(Hook):
    """Adds ``loss_mesa``, what the averaged model of an ``EMAHook`` expects, to a classifier's
    losses.

    Memory-efficient sharpness-aware training (arXiv 2205.14083, section 3.2) as VSSD's recipes have
    it, without a temperature: the averaged model, in eval mode and without gradients, sees the same
    images, mixed as they are, and the loss is ``value`` times the cross-entropy of the output with
    the softmax of its output. Nothing is added before ``begin``, nor in validation.

    It keeps no state of its own: the averages lie in the checkpoint, so that a resumed run is what
    it would have been.

    Args:
        value: weight of the loss. 1, 1.5 and 2 for VSSD tiny, small and base.
        begin: the part of the training, from 0 to below 1, after which it begins: of the epochs,
            or of the iterations where the loop counts those.
        head: name of the submodule whose result is the logits (B, classes).

    Raises:
        ValueError: on a value that is not allowed.
        UserError: if the config has no EMAHook, the model no such submodule, or that gives no
            logits.
    """

    def __init__(self, value: float = 1.0, begin: float = 0.25, head: str = 'head'):
        if not value > 0:
            raise ValueError(f'value of MESAHook must be a number above 0, got {value!r}')
        if not 0 <= begin < 1:
            raise ValueError(f'begin of MESAHook must be from 0 to below 1, got {begin!r}')
        self.value, self.begin, self.head = value, begin, head
        self.is_active = False
        self._logits: Tensor | None = None
        self._handles: list = []

    def before_train(self, runner) -> None:
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if len(averages) != 1:
            raise UserError(f'MESAHook needs one EMAHook in custom_hooks, whose averaged model '
                            f'teaches; this config has {len(averages)}')
        model = unwrapped(runner.model)
        try:
            head = model.get_submodule(self.head)
        except AttributeError as err:
            raise UserError(f'MESAHook needs the submodule {self.head!r} of the model, which gives '
                            f'its logits; {type(model).__name__} has '
                            f'{", ".join(dict(model.named_children()))}') from err
        teacher = averages[0].ema_model.module.eval()
        self._handles = [
            head.register_forward_hook(self._keep_logits),
            model.register_forward_hook(self._loss_of(teacher), with_kwargs=True)]

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self.is_active = runner.epoch >= self.begin * runner.max_epochs
        else:
            self.is_active = runner.iter >= self.begin * runner.max_iters

    def _keep_logits(self, head, args, logits):
        if self.is_active and head.training:
            self._logits = logits

    def _loss_of(self, teacher) -> Callable:
        def add_loss(model, args, kwargs, losses):
            logits, self._logits = self._logits, None
            if not (self.is_active and model.training and isinstance(losses, dict)):
                return None
            inputs = kwargs['inputs'] if 'inputs' in kwargs else args[0]
            with torch.no_grad():
                wanted = teacher(inputs, mode='tensor')
            for result in (logits, wanted):
                if not isinstance(result, Tensor) or result.dim() != 2:
                    raise UserError(f'MESAHook needs logits (B, classes) from {self.head!r}, got '
                                    + (f'a tensor {tuple(result.shape)}'
                                       if isinstance(result, Tensor) else type(result).__name__))
            return losses | dict(loss_mesa=self.value * soft_cross_entropy(logits, wanted))

        return add_loss
