"""Every name of torch that is not public and that this package uses.

torch may move them in any release. Each is looked up here, once, and nothing breaks where one is
gone: ``MISSING`` then holds its name, and what needs it takes the public way, which is slower
(:mod:`vmamba_mm.ops.core.calls` registers ops by ``torch.library.custom_op``).
``tests/ops/test_define_op.py`` fails with the version of torch as soon as one is missing.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

_NAMES = {
    # Context managers: autocast is off; dispatch goes below autograd.
    'no_autocast': '_C._DisableAutocast',
    'below_autograd': '_C._AutoDispatchBelowAutograd',
    # Who watches what the dispatcher does.
    'is_tracing': '_C._is_tracing',
    'count_dispatch_modes': '_C._len_torch_dispatch_stack',
    'is_profiling': 'autograd._profiler_enabled',
    'are_transforms_active': '_C._are_functorch_transforms_active',
    'is_legacy_batched': '_C._functorch.is_legacy_batchedtensor',
    'unwrap_if_dead': '_C._functorch.unwrap_if_dead',
    # As torch.compiler.disable, which imports Dynamo at once: a second.
    'hide_from_dynamo': '_disable_dynamo',
    'destroy_library': 'library.Library._destroy',
    'has_global_hook': 'nn.modules.module._has_any_global_hook',
}


def _find(path: str) -> Any:
    return reduce(lambda owner, name: getattr(owner, name, None), path.split('.'), torch)


_PRIVATE = {name: _find(path) for name, path in _NAMES.items()}
#: The names that this version of torch lacks.
MISSING = tuple(f'torch.{_NAMES[name]}' for name, value in _PRIVATE.items() if value is None)

no_autocast: Callable = _PRIVATE['no_autocast']
below_autograd: Callable = _PRIVATE['below_autograd']
is_tracing: Callable[[], bool] = _PRIVATE['is_tracing']
count_dispatch_modes: Callable[[], int] = _PRIVATE['count_dispatch_modes']
is_profiling: Callable[[], bool] = _PRIVATE['is_profiling']
are_transforms_active: Callable[[], bool] = (_PRIVATE['are_transforms_active']
                                             or (lambda: False))
is_legacy_batched: Callable[[Any], bool] = _PRIVATE['is_legacy_batched']
unwrap_if_dead: Callable = _PRIVATE['unwrap_if_dead']
hide_from_dynamo: Callable = _PRIVATE['hide_from_dynamo']
destroy_library: Callable = _PRIVATE['destroy_library'] or (lambda library: None)
# A hook that nobody can rule out counts as one: then modules run one by one.
has_global_hook: Callable[[], bool] = _PRIVATE['has_global_hook'] or (lambda: True)


#: (bias, left, right), relu of the product and bias, by one launch on a GPU. None if it is gone.
addmm_activation: Callable | None = getattr(torch, '_addmm_activation', None)


# --- on a GPU: builds for CPUs lack these names, and nothing calls them there -------------------

#: Index of the current GPU.
current_device: Callable[[], int] = getattr(torch._C, '_cuda_getDevice', torch.cuda.current_device)
#: Handle of the current stream of the GPU with an index.
current_stream: Callable[[int], int] = getattr(
    torch._C, '_cuda_getCurrentRawStream',
    lambda index: torch.cuda.current_stream(index).cuda_stream)
