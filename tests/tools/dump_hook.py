"""Named in a test's config by custom_imports: writes each process's gradients and parameters."""

import os

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DumpHook(Hook):
    def __init__(self, folder):
        self.folder = folder

    def save(self, runner, name, value):
        os.makedirs(self.folder, exist_ok=True)
        torch.save(value, f'{self.folder}/{name}_{runner.rank}_of_{runner.world_size}.pt')

    def before_train(self, runner):
        names = {p: n.removeprefix('module.') for n, p in runner.model.named_parameters()}

        def before_step(optimizer, args, kwargs):
            if runner.iter == 0:
                self.save(runner, 'gradients', {names[p]: p.grad.clone() for g in
                                                optimizer.param_groups for p in g['params']})

        runner.optim_wrapper.optimizer.register_step_pre_hook(before_step)

    def after_train(self, runner):
        state = runner.model.state_dict()
        self.save(runner, 'state', {k.removeprefix('module.'): v for k, v in state.items()})
