"""Denoising diffusion with a learned variance (arXiv 2006.11239, 2102.09672): how noise is added,
the loss, and the loop of a sampler."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ['GaussianDiffusion', 'sample']


class GaussianDiffusion:
    """The noise that is added over time, and the loss of a model that predicts it.

    Noise is predicted, and where the model gives twice the channels, also where the variance lies
    between the two that are possible, in the logarithm (section 3.1, arXiv 2102.09672).

    Args:
        num_steps: T; times go from 0 to T - 1.
        beta_start, beta_end: of the variance that is added at a time, which grows linearly.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        if not isinstance(num_steps, int) or num_steps < 2:
            raise ValueError(f'num_steps must be an int of at least 2, got {num_steps!r}')
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError('betas must rise from above 0 to below 1, got '
                             f'beta_start={beta_start!r} and beta_end={beta_end!r}')
        self.num_steps = num_steps
        betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device='cpu')
        kept = (1 - betas).cumprod(0)
        before = torch.cat((torch.ones(1, dtype=torch.float64, device='cpu'), kept[:-1]))
        posterior = betas * (1 - before) / (1 - kept)
        # The first is 0, whose logarithm is taken to be the second's.
        posterior[0] = posterior[1]
        self.betas, self.kept = betas, kept
        # In fp64, whatever the model is, and copied to a device once.
        tables = dict(
            signal=kept.sqrt(), noise=(1 - kept).sqrt(),
            mean_of_start=betas * before.sqrt() / (1 - kept),
            mean_of_noisy=(1 - before) * (1 - betas).sqrt() / (1 - kept),
            low_log_var=posterior.log(), high_log_var=betas.log())
        self._tables = {(name, betas.device): table for name, table in tables.items()}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The numbers of a table at times t (B), in the shape and dtype to go with ``like``."""
        key = name, t.device
        if key not in self._tables:
            self._tables[key] = self._tables[name, self.betas.device].to(t.device)
        return self._tables[key][t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_start`` at times t (B), with ``noise`` of the same shape (B, C, H, W)."""
        return self._at('signal', t, x_start) * x_start + self._at('noise', t, noise) * noise

    def losses(self, model_output: Tensor, x_start: Tensor, noise: Tensor, t: Tensor,
               x_t: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of each sample: that of the noise, and what the variance adds to it.

        Args:
            model_output: (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            x_start: (B, C, H, W), in [-1, 1] where it is an image.
            noise: that was added.
            t: (B), in whole numbers.
            x_t: what :meth:`add_noise` gave; None to calculate it.

        Returns:
            'loss' (B), 'mse' (B), and with a learned variance 'vb' (B), a term of the variational
            bound in bits of a dimension, which trains the variance alone (section 3.1).
        """
        channels = x_start.shape[1]
        eps, fraction = model_output[:, :channels], model_output[:, channels:]
        mse = (noise - eps).square().flatten(1).mean(1)
        if not fraction.shape[1]:
            return dict(loss=mse, mse=mse)
        if x_t is None:
            x_t = self.add_noise(x_start, noise, t)
        vb = self._bound(eps.detach(), fraction, x_start, x_t, t)
        return dict(loss=mse + vb, mse=mse, vb=vb)

    def _bound(self, eps, fraction, x_start, x_t, t):
        """A term of the bound, (B): KL divergence, or at t = 0 the likelihood of 8-bit values."""
        guess = (x_t - self._at('noise', t, eps) * eps) / self._at('signal', t, eps)
        low, high = (self._at(name, t, eps) for name in ('low_log_var', 'high_log_var'))
        log_var = low + (fraction + 1) / 2 * (high - low)
        true_mean, mean = (self._at('mean_of_start', t, x) * x
                           + self._at('mean_of_noisy', t, x) * x_t for x in (x_start, guess))
        kl = 0.5 * (log_var - low - 1 + (low - log_var).exp()
                    + (true_mean - mean).square() * (-log_var).exp())
        nll = -_log_likelihood(x_start, mean, 0.5 * log_var)
        terms = torch.where((t == 0).view(-1, *[1] * (kl.dim() - 1)), nll, kl)
        return terms.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """That of 8-bit values in [-1, 1] under a normal distribution, cut into 256 steps whose outer
    ones reach to infinity."""
    def below(offset):
        return _normal_cdf((x - mean + offset) * (-log_scale).exp())

    upper, lower = below(1 / 255), below(-1 / 255)
    inside = (upper - lower).clamp(min=1e-12).log()
    lowest, highest = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """By tanh, as trained (arXiv 1606.08415, section 2)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


@torch.no_grad()
def sample(predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor,
           num_steps: int, generator: Any = None,
           progress: Callable[[Any], Any] = iter) -> Tensor:
    """An image or latent made of noise.

    Args:
        predict: (x, t) -> what is predicted: (B, C, H, W), or (B, 2C, H, W) with a learned
            variance, which schedulers that do not know it are not given.
        scheduler: of diffusers; its order of times is used as it is.
        noise: (B, C, H, W), of a standard normal distribution.
        num_steps: how many times to call the model.
        generator: of random numbers, as diffusers takes it.
        progress: around the times, to show how far it is.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: if the scheduler needs a variance, and none is predicted.
    """
    # from_config hands down settings of schedulers of other kinds, so that it does not tell.
    learns = _takes(type(scheduler), 'variance_type') \
        and scheduler.config.variance_type in ('learned', 'learned_range')
    options = dict(generator=generator) if _takes(scheduler.step, 'generator') else {}
    scheduler.set_timesteps(num_steps, device=noise.device)
    x = noise * scheduler.init_noise_sigma
    for t in progress(scheduler.timesteps):
        out = predict(scheduler.scale_model_input(x, t), t)
        if learns and out.shape[1] == x.shape[1]:
            raise ValueError(f'the scheduler has variance_type={scheduler.config.variance_type!r}, '
                             "and the model predicts no variance: give it 'fixed_small'")
        if not learns:
            out = out[:, :x.shape[1]]
        x = scheduler.step(out, t, x, **options).prev_sample
    return x


def _takes(function, argument):
    return argument in inspect.signature(function).parameters
