"""What goes into the scans of a model while it runs, with no copy of its forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_mm.layers.ss2d import SS2D

_INPUTS = 6  # x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, D
# Modes see the op below autograd; without autograd, as in inference mode, the op itself.
_SCANS = {f'vmamba_mm::{prefix}{name}' for name in ('ss2d_scan_fwd', 'ss2d_scan_norm')
          for prefix in ('', '_')}


class _Recorder(TorchDispatchMode):
    """Keeps the inputs of the first scan after each module in ``entered``."""

    def __init__(self):
        super().__init__()
        self.entered: list[SS2D] = []
        self.found: dict[SS2D, tuple[Tensor, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.entered and func._schema.name in _SCANS:
            self.found[self.entered.pop()] = tuple(t.detach() for t in args[:_INPUTS])
        return func(*args, **(kwargs or {}))


@contextmanager
def record_scan_inputs(modules: Sequence[SS2D]) -> Iterator[dict[SS2D, tuple[Tensor, ...]]]:
    """Record what the op ``ss2d_scan`` gets in some modules of a model that runs in this context.

    Works on any device: a block with a hook in it does not run as one op. A compiled model runs
    eagerly. The results of the model are what they were.

    Args:
        modules: those to watch.

    Yields:
        A dict that fills as the model runs: module -> (x, x_proj_weight, dt_projs_weight,
        dt_projs_bias, A, D) of its last run, as :func:`vmamba_mm.ops.ss2d_scan` takes them.
    """
    recorder = _Recorder()
    handles = [module.register_forward_pre_hook(lambda m, _: recorder.entered.append(m))
               for module in modules]
    try:
        with torch.compiler.set_stance('force_eager'), recorder:
            yield recorder.found
    finally:
        for handle in handles:
            handle.remove()
