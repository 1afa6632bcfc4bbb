"""Denoising diffusion: the noise that is added, the loss against its definition, and samplers."""

import math

import pytest
import torch

from vmamba_mm.heads.diffusion import GaussianDiffusion, sample

pytest.importorskip('diffusers', reason='needs vmamba_mm[diffusion]')

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler  # noqa: E402

from vmamba_mm.integrations.diffusers import (  # noqa: E402
    RespacedDDIMScheduler,
    published_scheduler,
)


def draw(count=3, channels=2, side=4, learned=True, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.rand(count, channels, side, side, dtype=dtype) * 2 - 1
    out = torch.randn(count, channels * (1 + learned), side, side, dtype=dtype)
    return x, torch.randn_like(x), out


def test_noise_is_that_of_diffusers():
    x, noise, _ = draw(dtype=torch.float32)
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(GaussianDiffusion().add_noise(x, noise, t),
                               published_scheduler().add_noise(x, noise, t))


def test_the_bound_is_a_kl_divergence():
    """In nats of torch.distributions, of the two steps back from x_t."""
    diffusion = GaussianDiffusion(50, 1e-3, 0.1)
    x, noise, out = draw()
    t = torch.tensor([1, 20, 49])
    x_t = diffusion.add_noise(x, noise, t)
    losses = diffusion.losses(out, x, noise, t)
    betas = torch.linspace(1e-3, 0.1, 50, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    for i, step in enumerate(t.tolist()):
        beta, now, before = betas[step], kept[step], kept[step - 1]
        low = (beta * (1 - before) / (1 - now)).log()
        eps, fraction = out[i].chunk(2)
        log_var = (fraction + 1) / 2 * beta.log() + (1 - (fraction + 1) / 2) * low
        start = (x_t[i] - (1 - now).sqrt() * eps) / now.sqrt()
        true, found = (torch.distributions.Normal(
            (beta * before.sqrt() * s + (1 - before) * (1 - beta).sqrt() * x_t[i]) / (1 - now),
            (0.5 * v).exp()) for s, v in ((x[i], low.expand_as(log_var)), (start, log_var)))
        expected = torch.distributions.kl_divergence(true, found).mean() / math.log(2)
        assert losses['vb'][i].item() == pytest.approx(expected.item(), rel=1e-9)
        assert losses['mse'][i].item() == pytest.approx((noise[i] - eps).square().mean().item())
    assert torch.equal(losses['loss'], losses['mse'] + losses['vb'])


def test_the_last_step_is_a_likelihood_of_bytes():
    """Of 256 values, whose probabilities add up to 1."""
    diffusion = GaussianDiffusion()
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)
    x_t = torch.full_like(values, 0.1)
    out = torch.zeros(256, 2, 1, 1, dtype=torch.float64)
    bits = diffusion.losses(out, values, torch.zeros_like(values), torch.zeros(256).long(), x_t)
    assert torch.exp2(-bits['vb']).sum().item() == pytest.approx(1, abs=1e-6)


def test_the_bound_trains_the_variance_alone():
    x, noise, out = draw()
    out.requires_grad_()
    losses = GaussianDiffusion().losses(out, x, noise, torch.tensor([0, 7, 900]))
    grad, = torch.autograd.grad(losses['vb'].sum(), out)
    assert not grad[:, :2].any() and grad[:, 2:].abs().amin() > 0


def test_without_a_learned_variance():
    x, noise, out = draw(learned=False)
    losses = GaussianDiffusion().losses(out, x, noise, torch.tensor([0, 7, 900]))
    assert set(losses) == {'loss', 'mse'} and torch.equal(losses['loss'], losses['mse'])


@pytest.mark.parametrize('kwargs', [dict(num_steps=1), dict(num_steps=2.0), dict(beta_start=0),
                                    dict(beta_start=0.1, beta_end=0.01), dict(beta_end=1.0)])
def test_wrong_values(kwargs):
    with pytest.raises(ValueError, match='num_steps must be|betas must rise'):
        GaussianDiffusion(**kwargs)


# --- samplers -----------------------------------------------------------------------------------

def of_one_image(image):
    """A model that sees the noise around the only image that there is, exactly."""
    kept = GaussianDiffusion().kept

    def predict(x, t):
        eps = (x - kept[int(t)].sqrt() * image) / (1 - kept[int(t)]).sqrt()
        return torch.cat((eps, torch.zeros_like(eps)), dim=1).float()

    return predict


@pytest.mark.parametrize('scheduler', [
    published_scheduler(), RespacedDDIMScheduler(beta_start=1e-4, beta_end=0.02,
                                                 timestep_spacing='linspace', clip_sample=False),
    DDIMScheduler.from_config(published_scheduler().config),
    DPMSolverMultistepScheduler.from_config(published_scheduler().config),
    EulerDiscreteScheduler.from_config(published_scheduler().config)],
    ids=lambda scheduler: type(scheduler).__name__)
def test_samplers_find_the_only_image(scheduler):
    """With or without a learned variance beside the noise."""
    image = torch.tanh(torch.randn(1, 3, 4, 4, generator=torch.manual_seed(1)))
    noise = torch.randn(2, 3, 4, 4)
    found = sample(of_one_image(image), scheduler, noise, 20, torch.manual_seed(2))
    assert (found - image).abs().max() < 0.1


@pytest.mark.parametrize('options', [
    dict(), dict(clip_sample=False), dict(set_alpha_to_one=False, clip_sample_range=0.5),
    dict(thresholding=True, sample_max_value=1.5)])
def test_ddim_is_that_of_diffusers_where_its_times_are(options):
    """The noise goes by the clipped image, as in the public code."""
    ours, theirs = (cls(**options) for cls in (RespacedDDIMScheduler, DDIMScheduler))
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    for t in (750, 250, 0):
        expected = theirs.step(out, t, x, use_clipped_model_output=True)
        torch.testing.assert_close(ours.step(out, t, x).prev_sample, expected.prev_sample)


def test_ddim_goes_by_its_own_list():
    """Noise is added with eta alone, and from the generator."""
    scheduler = RespacedDDIMScheduler(timestep_spacing='linspace', clip_sample=True)
    with pytest.raises(ValueError, match='set_timesteps'):
        scheduler.step(torch.zeros(1, 1, 2, 2), 3, torch.zeros(1, 1, 2, 2))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 666, 333, 0]
    x, out = torch.randn(1, 1, 2, 2), torch.randn(1, 2, 2, 2)
    kept = scheduler.alphas_cumprod
    step = scheduler.step(out, 666, x)
    start = ((x - (1 - kept[666]).sqrt() * out[:, :1]) / kept[666].sqrt()).clamp(-1, 1)
    torch.testing.assert_close(step.pred_original_sample, start)
    eps = (x - kept[666].sqrt() * start) / (1 - kept[666]).sqrt()
    torch.testing.assert_close(step.prev_sample,
                               kept[333].sqrt() * start + (1 - kept[333]).sqrt() * eps)
    last, guess = scheduler.step(out, 0, x, return_dict=False)
    torch.testing.assert_close(last, guess)
    noisy = [scheduler.step(out, 666, x, eta=1.0, generator=torch.manual_seed(s)).prev_sample
             for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    kept_at_0 = RespacedDDIMScheduler(set_alpha_to_one=False, clip_sample=False)
    kept_at_0.set_timesteps(1000)
    torch.testing.assert_close(kept_at_0.step(out, 0, x).prev_sample, x)  # stays at time 0
    other = RespacedDDIMScheduler(prediction_type='v_prediction')
    other.set_timesteps(4)
    with pytest.raises(ValueError, match="must be 'epsilon'"):
        other.step(out, 0, x)
