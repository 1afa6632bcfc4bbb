"""Whether an op may take the place of submodules."""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class does and no more.

    It is not wrapped, replaced or compiled, has no ``forward`` of its own as adapters and
    offloading libraries set it, and nobody watches: no hook, be it on this module or on all.
    """
    return (type(module) is kind and 'forward' not in module.__dict__
            and module._compiled_call_impl is None
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks or _has_any_global_hook()))


def read_parameters(module: nn.Module, *names: str) -> list[Tensor | None]:
    """Its parameters, which may be plain attributes: FSDP's views of its flat parameter, and
    those of nn.DataParallel's replicas, are. ``nn.Module.__getattr__`` is slower."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def is_plain_conv(module: nn.Module) -> bool:
    """Whether it is a plain convolution that is the same both ways, with a bias, zeros around the
    map, and neither groups nor dilation."""
    return (is_plain(module, nn.Conv2d) and module.bias is not None and module.groups == 1
            and (module.dilation, module.padding_mode) == ((1, 1), 'zeros')
            and module.stride == module.stride[::-1]
            and module.padding == module.padding[::-1])  # which no name, as 'same', is


def is_depthwise_3x3(module: nn.Module | None) -> bool:
    """Whether it is a plain depthwise 3x3 convolution that keeps the size of a map."""
    return (is_plain(module, nn.Conv2d)
            and module.groups == module.in_channels == module.out_channels
            and (module.kernel_size, module.stride, module.padding, module.dilation,
                 module.padding_mode) == ((3, 3), (1, 1), (1, 1), (1, 1), 'zeros'))
