"""The optimizer's parameter groups."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from vmamba_mm.errors import UserError
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
        self.adjust(params, module)
        groups: dict[str, dict] = {}
        for group in params:
            settings = repr(sorted((k, v) for k, v in group.items() if k != 'params'))
            if settings in groups:
                groups[settings]['params'].extend(group['params'])
            else:
                groups[settings] = group
        params[:] = groups.values()

    def adjust(self, params: list[dict], model: nn.Module) -> None:
        """Change the settings of the groups, of one parameter each; for subclasses."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(GroupedOptimWrapperConstructor):
    """The same, with learning rates that fall from the head to the stem (arXiv 2003.10555).

    ``paramwise_cfg`` takes ``layer_decay_rate``: the rate of a parameter of the model's
    ``backbone`` is multiplied by it once for each block between it and the head, as
    :meth:`vmamba_mm.models.base.Backbone.get_layer_depth` counts them. All else keeps its rate.

    Raises:
        UserError: if ``layer_decay_rate`` is missing, or no number above 0 and up to 1.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None):
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        decay = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise UserError('LayerDecayOptimWrapperConstructor needs a paramwise_cfg with '
                            f'layer_decay_rate above 0 and up to 1, got {decay!r}')

    def adjust(self, params: list[dict], model: nn.Module) -> None:
        decay = self.paramwise_cfg['layer_decay_rate']
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in params:
            parameter, = group['params']
            depth, count = model.backbone.get_layer_depth(names[parameter], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * decay ** (count - 1 - depth)
