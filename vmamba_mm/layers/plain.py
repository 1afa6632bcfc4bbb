"""Whether an op may take the place of submodules."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class does and no more: it is not wrapped or
    replaced, as by adapters, and nothing is hooked to it."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks
                                         or module._backward_hooks or module._backward_pre_hooks)
