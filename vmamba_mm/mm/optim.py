"""The optimizer's parameter groups."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from vmamba_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default, with the parameters of the same settings in one group.

    mmengine makes a group of every parameter, and an optimizer launches its kernels for each group:
    with two to four groups a fused AdamW is a handful of launches. Settings, arguments and the
    update of each parameter stay the same. A checkpoint's optimizer state fits only what was
    built with the same constructor.
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: int | float | None = None) -> None:
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:  # a submodule, from the recursion
            return
        groups: dict[str, dict] = {}
        for group in params:
            settings = repr(sorted((k, v) for k, v in group.items() if k != 'params'))
            if settings in groups:
                groups[settings]['params'].extend(group['params'])
            else:
                groups[settings] = group
        params[:] = groups.values()
