"""Whether an op may take the place of submodules."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class does and no more: it is not wrapped or
    replaced, as by adapters, and nothing is hooked to it."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks
                                         or module._backward_hooks or module._backward_pre_hooks)


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
