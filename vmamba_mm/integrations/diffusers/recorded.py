"""Diffusion with recorded random numbers, for tools/check_parity.py and tests."""

from typing import Any
from unittest import mock

import diffusers.schedulers.scheduling_ddpm
import torch
from torch import Tensor

from vmamba_mm.heads.diffusion import GaussianDiffusion, sample
from vmamba_mm.integrations.diffusers.schedulers import RespacedDDIMScheduler, published_scheduler

_DDIM = dict(beta_start=1e-4, beta_end=0.02, beta_schedule='linear', clip_sample=False)
_KEPT = GaussianDiffusion().kept


def training_losses(x_start: Tensor, noise: Tensor, t: Tensor, model_output: Tensor
                    ) -> dict[str, Tensor]:
    """'x_t', and 'loss', 'mse' and 'vb' of each sample, with 'mean_loss'."""
    diffusion = GaussianDiffusion()
    x_t = diffusion.add_noise(x_start, noise, t)
    losses = diffusion.losses(model_output, x_start, noise, t, x_t)
    return dict(losses, x_t=x_t, mean_loss=losses['loss'].mean())


def spacing() -> dict[str, dict[str, Any]]:
    """The times of samplers, and the variance that each of their steps adds, by the names of the
    public code: 'N' for DDPM in N steps, 'ddimN' for DDIM in as many, '' for all times, of which
    the variance is not asked."""
    found = {'': dict(_spaced(published_scheduler(), 1000), betas=None)}
    for prefix, scheduler in (('', published_scheduler()),
                              ('ddim', RespacedDDIMScheduler(timestep_spacing='leading', **_DDIM))):
        found |= {f'{prefix}{steps}': _spaced(scheduler, steps) for steps in range(1, 1001)}
    return found


def _spaced(scheduler, steps):
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.flip(0)
    # As the scheduler's, in more bits.
    kept = _KEPT[times]
    return dict(timestep_map=times.tolist(),
                betas=1 - kept / torch.cat((torch.ones(1, dtype=kept.dtype), kept[:-1])))


def trajectories(start: Tensor, W: Tensor, noise: Tensor, steps: int) -> dict[str, Any]:
    """All that samplers pass through, with tanh(W x) (1 + t / 1000) / 2 for a model.

    Args:
        start: (B, C, H, W).
        W: (2C, C).
        noise: (steps, B, C, H, W), of each step.

    Returns:
        'timestep_map', and 'ddpm', 'ddpm_clip' and 'ddim_eta0' (steps, B, C, H, W).
    """
    schedulers = dict(ddpm=published_scheduler(), ddpm_clip=published_scheduler(clip_sample=True),
                      ddim_eta0=RespacedDDIMScheduler(timestep_spacing='linspace', **_DDIM))
    found: dict[str, Any] = {}
    for name, scheduler in schedulers.items():
        seen, rows = [], iter(noise)

        def predict(x, t, seen=seen):
            seen.append(x)
            return torch.tanh(torch.einsum('oc,bchw->bohw', W, x)) * (1 + t / 1000) / 2

        with mock.patch.object(diffusers.schedulers.scheduling_ddpm, 'randn_tensor',
                               lambda *args, rows=rows, **kwargs: next(rows)):
            last = sample(predict, scheduler, start, steps)
        found[name] = torch.stack([*seen[1:], last])
        found['timestep_map'] = scheduler.timesteps.flip(0).tolist()
    return found
