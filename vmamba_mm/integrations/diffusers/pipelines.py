"""The pipeline that makes images of noise by DiS."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vmamba_mm.heads.diffusion import sample
from vmamba_mm.integrations.diffusers.models import DiS2DModel

_OUTPUTS = ('pil', 'np', 'pt', 'latent')


class DiSPipeline(DiffusionPipeline):
    """Images of noise, of classes where the model has these, by any scheduler of diffusers.

    Args:
        model: of pixels, or of latents with a ``vae``.
        scheduler: :func:`vmamba_mm.diffusers.published_scheduler` is that of the paper; of DDIM
            take :class:`vmamba_mm.diffusers.RespacedDDIMScheduler`. Others get the noise alone.
        vae: decodes latents; None for a model of pixels.
    """

    model_cpu_offload_seq = 'model->vae'
    _optional_components = ['vae']

    def __init__(self, model: DiS2DModel, scheduler: Any, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(self, class_labels: int | Sequence[int] | None = None, batch_size: int = 1,
                 guidance_scale: float = 1.5, guided_channels: int | None = 3,
                 num_inference_steps: int = 250,
                 generator: torch.Generator | Sequence[torch.Generator] | None = None,
                 latents: Tensor | None = None, output_type: str = 'pil',
                 return_dict: bool = True) -> ImagePipelineOutput | tuple:
        """Make images.

        Args:
            class_labels: one class for each image; None for a model without classes.
            batch_size: how many images where there are no classes.
            guidance_scale: s of "no class + s (class - no class)"; 1 for no guidance, which takes
                half the time.
            guided_channels: the first channels of the noise alone are guided, 3 as published; None
                for all.
            num_inference_steps: how many times the model is called, or twice with guidance.
            generator: of random numbers, or one for each image.
            latents: the noise to begin with, (B, C, H, W); None to draw it.
            output_type: 'pil', 'np' (B, H, W, C) from 0 to 1, 'pt' (B, C, H, W) from 0 to 1, or
                'latent' for what the model makes.
            return_dict: whether the result has the attribute ``images``, or is a tuple.

        Raises:
            ValueError: on a value that is not allowed.
        """
        if output_type not in _OUTPUTS:
            raise ValueError(f'output_type={output_type!r} does not exist; choose one of '
                             f'{_OUTPUTS}')
        config, device = self.model.config, self._execution_device
        labels = self._labels(class_labels, config.num_classes, device)
        count = batch_size if labels is None else len(labels)
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError('num_inference_steps must be an int of at least 1, got '
                             f'{num_inference_steps!r}')
        if isinstance(generator, list | tuple) and len(generator) != count:
            raise ValueError(f'{len(generator)} generators do not fit {count} images')
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device,
                                   dtype=self.model.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f'latents must be of the shape {shape}, got {tuple(latents.shape)}')
        predict = self._predictor(labels, guidance_scale, guided_channels)
        x = sample(predict, self.scheduler, latents.to(device, self.model.dtype),
                   num_inference_steps, generator, self.progress_bar)
        images = x if output_type == 'latent' else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels, num_classes, device):
        if not num_classes:
            if class_labels is not None:
                raise ValueError('the model has no classes: leave class_labels out')
            return None
        if class_labels is None:
            raise ValueError(f'the model has {num_classes} classes: say by class_labels which ones '
                             f'to make ({num_classes} for none)')
        labels = torch.as_tensor(class_labels, device='cpu').reshape(-1)
        if labels.is_floating_point() or not labels.numel() \
                or not 0 <= labels.min() <= labels.max() <= num_classes:
            raise ValueError(f'class_labels must be whole numbers from 0 to {num_classes}, got '
                             f'{class_labels!r}')
        return labels.to(device)

    def _predictor(self, labels, scale, guided_channels):
        if labels is None or scale == 1:
            return lambda x, t: self.model(x, t, labels, return_dict=False)[0]
        both = torch.cat((labels, torch.full_like(labels, self.model.config.num_classes)))

        def predict(x, t):
            out, = self.model(torch.cat((x, x)), t, both, return_dict=False)
            return self.model.guide(out, scale, guided_channels)[:len(x)]

        return predict

    def _decode(self, x, output_type):
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == 'pt':
            return images
        images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(images) if output_type == 'pil' else images


# Where users, and the files of pipelines, find it.
DiSPipeline.__module__ = 'vmamba_mm.diffusers'
