"""Published recipes: their rates and decay, and with a small model for tests that train a step."""

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
        optim_cfg.pop(key, None)
    wrapper = build_optim_wrapper(model, optim_cfg)
    of_id = {id(p): (group['lr'] / cfg.optim_wrapper.optimizer.lr, group['weight_decay'])
             for group in wrapper.optimizer.param_groups for p in group['params']}
    return {name: of_id[id(p)] for name, p in model.named_parameters()}, wrapper


def learning_rates(cfg, epoch_length, total):
    """The learning rate of every iteration, stepped as mmengine's ParamSchedulerHook does."""
    import torch
    from mmengine.registry import PARAM_SCHEDULERS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)],
                                lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for item in cfg.param_scheduler:
        assert 'end' in item
        schedulers.append(PARAM_SCHEDULERS.build(
            item, default_args=dict(optimizer=optimizer, epoch_length=epoch_length)))
    optimizer.step()  # torch warns about a scheduler that steps first
    found = []
    for i in range(1, total + 1):
        found.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or i % epoch_length == 0:
                scheduler.step()
    return found
