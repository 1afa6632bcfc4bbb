"""What goes into the ops of a model while it runs, with no copy of its forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba_mm.layers.ss2d import SS2D

_SCANS = ('ss2d_scan_fwd', 'ss2d_scan_norm')
_SCAN_INPUTS = ('x', 'x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A', 'D')


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the first of some ops after each module in ``entered``."""

    def __init__(self, ops: Sequence[str], keep: Callable[[dict[str, Any]], Any]):
        super().__init__()
        self.keep = keep
        # Modes see the op below autograd; without autograd, as in inference mode, the op itself.
        self.ops = {f'vmamba_mm::{prefix}{op}' for op in ops for prefix in ('', '_')}
        self.entered: list[nn.Module] = []
        self.recorded: dict[nn.Module, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.entered and func._schema.name in self.ops:
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.recorded[self.entered.pop()] = self.keep({
                name: value.detach() if isinstance(value, Tensor) else value
                for name, value in arguments.items()})
        return func(*args, **(kwargs or {}))


@contextmanager
def _record(modules: Sequence[nn.Module], ops: Sequence[str],
            keep: Callable[[dict[str, Any]], Any]) -> Iterator[dict[nn.Module, Any]]:
    recorder = _Recorder(ops, keep)
    handles = [module.register_forward_pre_hook(lambda m, _: recorder.entered.append(m))
               for module in modules]
    try:
        with torch.compiler.set_stance('force_eager'), recorder:
            yield recorder.recorded
    finally:
        for handle in handles:
            handle.remove()


def record_inputs(modules: Sequence[nn.Module], *ops: str
                  ) -> AbstractContextManager[dict[nn.Module, dict[str, Any]]]:
    """Record what an op of this package gets in some modules of a model that runs in this context.

    Works on any device: a block with a hook in it does not run as one op. A compiled model runs
    eagerly. The results of the model are what they were.

    Args:
        modules: those to watch.
        ops: names in ``torch.ops.vmamba_mm``, such as 'selective_scan_fwd'; the first of them that
            runs in a module is the one recorded.

    Returns:
        A context manager for a dict that fills as the model runs: module -> {name of an argument:
        its value} of the module's last run.
    """
    return _record(modules, ops, lambda arguments: arguments)


def record_scan_inputs(modules: Sequence[SS2D]
                       ) -> AbstractContextManager[dict[SS2D, tuple[Tensor, ...]]]:
    """:func:`record_inputs` of the op ``ss2d_scan`` in some SS2D.

    Returns:
        A context manager for a dict that fills as the model runs: module -> (x, x_proj_weight,
        dt_projs_weight, dt_projs_bias, A, D) of its last run, as :func:`vmamba_mm.ops.ss2d_scan`
        takes them.
    """
    return _record(modules, _SCANS,
                   lambda arguments: tuple(arguments[name] for name in _SCAN_INPUTS))
