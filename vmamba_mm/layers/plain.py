"""Whether an op may take the place of submodules."""

from collections.abc import Iterable

from torch import Tensor, nn

from vmamba_mm.ops.core.torch_private import has_global_hook


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its class does and no more.

    It is not wrapped, replaced or compiled, has no ``forward`` of its own as adapters and
    offloading libraries set it, and nobody watches: no hook, be it on this module or on all.
    """
    return are_plain((module,), (kind,))


def are_plain(modules: Iterable[nn.Module], kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether each is, asked at once: small images wait for the questions of all blocks."""
    for module, kind in zip(modules, kinds, strict=True):
        if type(module) is not kind:
            return False
        attributes = module.__dict__
        if 'forward' in attributes or attributes.get('_compiled_call_impl') is not None \
                or attributes['_forward_hooks'] or attributes['_forward_pre_hooks'] \
                or attributes['_backward_hooks'] or attributes['_backward_pre_hooks']:
            return False
    return not has_global_hook()


class Attributes:
    """A module's parameters by name where they are plain attributes, and ``_parameters`` lacks
    them: FSDP's views of its flat parameter, and those of nn.DataParallel's replicas."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __getitem__(self, name: str) -> Tensor | None:
        return getattr(self.module, name)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether ``module`` is a plain convolution that is the same both ways, with a bias, zeros
    around the map, and neither groups nor dilation."""
    return (is_plain(module, nn.Conv2d) and module.bias is not None and module.groups == 1
            and (module.dilation, module.padding_mode) == ((1, 1), 'zeros')
            and module.stride == module.stride[::-1]
            and module.padding == module.padding[::-1])  # which no name, as 'same', is


def is_depthwise(module: nn.Module | None, size: int) -> bool:
    """Whether ``module`` is a plain depthwise convolution of an odd size that keeps that of a
    map."""
    return (is_plain(module, nn.Conv2d)
            and module.groups == module.in_channels == module.out_channels
            and (module.kernel_size, module.stride, module.padding, module.dilation,
                 module.padding_mode) == ((size,) * 2, (1, 1), (size // 2,) * 2, (1, 1), 'zeros'))


def is_depthwise_3x3(module: nn.Module | None) -> bool:
    return is_depthwise(module, 3)


def is_pointwise(module: nn.Module) -> bool:
    """Whether ``module`` is a plain 1x1 convolution, a product of each pixel with a matrix."""
    return (is_plain(module, nn.Conv2d) and module.groups == 1
            and (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0)))
