"""Schedulers of diffusers as the public code of DiS has them."""

import torch

# The two base classes are for vmamba_mm.diffusers.
from diffusers import DDIMScheduler, DDPMScheduler, ModelMixin, SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

#: What makes diffusers' ``DDPMScheduler`` the sampler that DiS was published with.
PUBLISHED = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule='linear',
                 variance_type='learned_range', clip_sample=False, prediction_type='epsilon',
                 timestep_spacing='linspace')


def published_scheduler(**options) -> DDPMScheduler:
    """diffusers' ``DDPMScheduler`` as DiS was published with it, but for ``options``."""
    return DDPMScheduler(**{**PUBLISHED, **options})


class RespacedDDIMScheduler(DDIMScheduler):
    """DDIM (arXiv 2010.02502) that steps to the next time of its own list, whatever the spacing.

    diffusers' own goes back by T / steps, which is not the next time of a list from 0 to T - 1
    (``timestep_spacing='linspace'``): there the two differ. Takes the arguments of diffusers'
    ``DDIMScheduler``, and a learned variance beside the noise, which it does not use.
    """

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float = 0.0,
             generator: torch.Generator | None = None, return_dict: bool = True
             ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step back in time (equation 12).

        Args:
            model_output: (B, C, H, W) or, with the variance, (B, 2C, H, W).
            timestep: one of ``timesteps``.
            sample: (B, C, H, W).
            eta: 0 for no noise, 1 for that of DDPM.
            generator, return_dict: as of diffusers' own.

        Raises:
            ValueError: before ``set_timesteps``, or if the model predicts something else than the
                noise.
        """
        if self.num_inference_steps is None:
            raise ValueError('call set_timesteps(num_inference_steps) before the first step')
        if self.config.prediction_type != 'epsilon':
            raise ValueError(f'prediction_type={self.config.prediction_type!r} is not known here; '
                             "it must be 'epsilon'")
        times = self.timesteps.tolist()
        index = times.index(int(timestep))
        kept = self.alphas_cumprod[times[index]]
        before = self.alphas_cumprod[times[index + 1]] if index + 1 < len(times) \
            else self.final_alpha_cumprod
        eps = model_output[:, :sample.shape[1]]
        start = (sample - (1 - kept).sqrt() * eps) / kept.sqrt()
        if self.config.thresholding or self.config.clip_sample:
            limit = self.config.clip_sample_range
            start = self._threshold_sample(start) if self.config.thresholding \
                else start.clamp(-limit, limit)
            eps = (sample - kept.sqrt() * start) / (1 - kept).sqrt()
        sigma = eta * ((1 - before) / (1 - kept) * (1 - kept / before)).clamp(min=0).sqrt()
        previous = before.sqrt() * start + (1 - before - sigma ** 2).clamp(min=0).sqrt() * eps
        if eta > 0:
            previous = previous + sigma * torch.randn(
                sample.shape, generator=generator, dtype=sample.dtype,
                device=generator.device if generator is not None else sample.device
            ).to(sample.device)
        if not return_dict:
            return previous, start
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=start)


# Where users, and the files of pipelines, find it.
RespacedDDIMScheduler.__module__ = 'vmamba_mm.diffusers'
