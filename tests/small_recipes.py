"""Published recipes with a small model: for tests that train a step."""

import copy

from specs import SPECS


def make_small(cfg, arch=None, num_classes=5):
    """The config with the first small architecture of its family, or another, and few classes."""
    cfg = copy.deepcopy(cfg)
    arch = arch or SPECS[cfg.model.backbone.type.removeprefix('vmamba_mm.').lower()].first
    # mmengine takes the key out of a dict that it merges.
    cfg.model.backbone.update(arch=dict(arch), init_cfg=None)
    cfg.model.head.update(in_channels=arch['embed_dims'], num_classes=num_classes)
    cfg.data_preprocessor.num_classes = num_classes
    return cfg


def settings_of(model, cfg):
    """{name of a parameter: (factor of the rate, decay)} as the optimizer has them, and that."""
    from mmengine.optim import build_optim_wrapper

    optim_cfg = copy.deepcopy(cfg.optim_wrapper)
    optim_cfg.type = 'OptimWrapper'  # the Amp one refuses a machine without a GPU
    for key in ('dtype', 'loss_scale'):
        optim_cfg.pop(key)
    wrapper = build_optim_wrapper(model, optim_cfg)
    of_id = {id(p): (group['lr'] / cfg.optim_wrapper.optimizer.lr, group['weight_decay'])
             for group in wrapper.optimizer.param_groups for p in group['params']}
    return {name: of_id[id(p)] for name, p in model.named_parameters()}, wrapper
