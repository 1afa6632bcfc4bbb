"""The training of a denoising model, and its samples, for mmengine's Runner."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.heads.diffusion import GaussianDiffusion, sample
from vmamba_mm.mm.compat import require
from vmamba_mm.registry import MODELS

#: The sampler of DiS as published.
SCHEDULER = dict(type='DDPMScheduler', beta_schedule='linear', variance_type='learned_range',
                 clip_sample=False, timestep_spacing='linspace')


@MODELS.register_module()
class DiffusionModel(BaseModel):
    """A model that predicts noise, as it is trained, and what it makes of noise in a test.

    A batch of a test asks for as many images, of the same classes; each sample gets the one that
    was made beside its own, for metrics that compare the two sets.

    Args:
        backbone: takes noisy images, times and classes, such as :class:`vmamba_mm.models.DiS`.
        diffusion: arguments of :class:`vmamba_mm.heads.diffusion.GaussianDiffusion`.
        class_dropout: how often a sample is trained without its class, for guidance.
        vae: of latents a folder, or a name of the hub, of diffusers' ``AutoencoderKL``, which is
            read when it is first needed and stays as it is; None for pixels.
        test_cfg: ``num_steps`` (250), ``guidance_scale`` (1.5; 1 for none), ``guided_channels``
            (3; None for all of the noise) and ``scheduler``, a class of diffusers as ``type`` and
            its arguments (the published DDPM).
        data_preprocessor: brings images to [-1, 1].
        init_cfg: mmengine's.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, backbone: dict | nn.Module, diffusion: Mapping[str, Any] | None = None,
                 class_dropout: float = 0.1, vae: str | None = None,
                 test_cfg: Mapping[str, Any] | None = None,
                 data_preprocessor: dict | nn.Module | None = None,
                 init_cfg: dict | list[dict] | None = None):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if not 0 <= class_dropout < 1:
            raise ValueError(f'class_dropout must be in [0, 1), got {class_dropout!r}')
        self.backbone = backbone if isinstance(backbone, nn.Module) else MODELS.build(backbone)
        self.diffusion = GaussianDiffusion(**(diffusion or {}))
        self.class_dropout = class_dropout
        self.vae = None if vae is None else FrozenVAE(vae)
        self.test_cfg = _check_test_cfg(test_cfg or {})

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, 3, H, W), in [-1, 1].
            data_samples: with ``gt_label`` of each where the backbone has classes.
            mode: 'loss' for a dict of losses; 'predict' for the samples with ``pred``, an image
                that was made, and ``image``, their own, (3, H, W) in uint8; 'tensor' for the noise
                that is predicted in the inputs at time 0.

        Raises:
            ValueError: on another mode.
            UserError: if a sample has no class, or one that the backbone has not.
        """
        labels = self._labels(data_samples, inputs)
        if mode == 'loss':
            return self._loss(self._encode(inputs), labels)
        if mode == 'predict':
            return self._predict(inputs, labels, data_samples)
        if mode == 'tensor':
            return self.backbone(self._encode(inputs), 0, labels)
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")

    def _labels(self, data_samples, inputs):
        count = self.backbone.num_classes
        if not count:
            return None
        if data_samples is None:
            return torch.full((len(inputs),), count, device=inputs.device)
        if any('gt_label' not in s for s in data_samples):
            raise UserError(f'the model has {count} classes, and a sample has none: let the data '
                            "set give classes (with_label=True), or set the backbone's "
                            'num_classes=0')
        labels = torch.stack([torch.as_tensor(s.gt_label).reshape(()) for s in data_samples])
        if not 0 <= labels.min() <= labels.max() < count:
            raise UserError(f'the data set has classes from {labels.min().item()} to '
                            f'{labels.max().item()}, and the model {count} classes, from 0 on: '
                            'set num_classes of the backbone')
        return labels.to(inputs.device)

    def _loss(self, x, labels):
        t = torch.randint(self.diffusion.num_steps, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        x_t = self.diffusion.add_noise(x, noise, t)
        if labels is not None and self.class_dropout:
            dropped = torch.rand(len(x), device=x.device) < self.class_dropout
            labels = labels.masked_fill(dropped, self.backbone.num_classes)
        out = self.backbone(x_t, t, labels).float()
        losses = self.diffusion.losses(out, x, noise, t, x_t)
        return {name: value.mean() for name, value in losses.items()}

    def _predict(self, inputs, labels, data_samples):
        made = self.sample(len(inputs), labels)
        samples = data_samples or [BaseDataElement() for _ in inputs]
        for item, image, own in zip(samples, to_uint8(made), to_uint8(inputs), strict=True):
            # Of mmpretrain's samples these would be something else.
            item.set_field(image, 'pred', dtype=Tensor)
            item.set_field(own, 'image', dtype=Tensor)
        return samples

    @torch.no_grad()
    def sample(self, count: int, labels: Tensor | None = None, generator: Any = None) -> Tensor:
        """Images in about [-1, 1], (count, 3, H, W), made of noise.

        Args:
            count: of images.
            labels: (count), where the backbone has classes.
            generator: of random numbers.
        """
        net, settings = self.backbone, self.test_cfg
        weight = next(net.parameters())
        size = net.arch['image_size']
        noise = torch.randn(count, net.in_channels, size, size, generator=generator,
                            device=weight.device, dtype=weight.dtype)
        scale = settings['guidance_scale']
        if labels is None or scale == 1:
            def predict(x, t):
                return net(x, t, labels)
        else:
            both = torch.cat((labels, torch.full_like(labels, net.num_classes)))

            def predict(x, t):
                return net.forward_with_cfg(torch.cat((x, x)), t, both, scale,
                                            settings['guided_channels'])[:len(x)]
        x = sample(predict, self._scheduler(), noise, settings['num_steps'], generator)
        return x if self.vae is None else self.vae.decode(x)

    def _scheduler(self):
        require('diffusers')
        import diffusers

        betas = self.diffusion.betas
        options = dict(trained_betas=betas.tolist(), num_train_timesteps=len(betas), **{
            k: v for k, v in self.test_cfg['scheduler'].items() if k != 'type'})
        name = self.test_cfg['scheduler'].get('type')
        kind = getattr(diffusers, str(name), None)
        if not hasattr(kind, 'set_timesteps'):
            raise ValueError(f'diffusers has no scheduler {name!r}: type= of test_cfg.scheduler is '
                             "one of its classes, such as 'DDPMScheduler'")
        unknown = sorted(set(options) - set(inspect.signature(kind).parameters))
        if unknown:
            raise ValueError(f"diffusers' {name} takes no {unknown}: leave them out of "
                             'test_cfg.scheduler (where a base config has them, by '
                             '_delete_=True), or take another scheduler')
        return kind(**options)

    def _encode(self, inputs):
        return inputs if self.vae is None else self.vae.encode(inputs)


class FrozenVAE:
    """An ``AutoencoderKL`` that is no part of the model around it: neither of its weights nor of
    its averages.

    Args:
        source: a folder, or a name of the hub.
    """

    def __init__(self, source: str):
        self.source, self.model = source, None

    def __deepcopy__(self, memo):
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Latents, drawn from their distribution and scaled, of images in [-1, 1]."""
        model = self._load(images)
        with torch.no_grad():
            return model.encode(images).latent_dist.sample() * model.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        model = self._load(latents)
        with torch.no_grad():
            return model.decode(latents / model.config.scaling_factor).sample

    def _load(self, like):
        if self.model is None:
            require('diffusers')
            from diffusers import AutoencoderKL

            try:
                model = AutoencoderKL.from_pretrained(self.source)
            except (OSError, ValueError) as err:
                raise UserError(f'the autoencoder vae={self.source!r} cannot be read '
                                f'({str(err).splitlines()[0]}): name a folder with config.json and '
                                'weights of diffusers, or a name of the hub') from err
            self.model = model.eval().requires_grad_(False)
        return self.model.to(like.device)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as whole numbers from 0 to 255."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _check_test_cfg(given):
    defaults = dict(num_steps=250, guidance_scale=1.5, guided_channels=3, scheduler=SCHEDULER)
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f'test_cfg has unknown keys {unknown}; it may have {list(defaults)}')
    settings = defaults | dict(given)
    if not isinstance(settings['num_steps'], int) or settings['num_steps'] < 1:
        raise ValueError('test_cfg: num_steps must be an int of at least 1, got '
                         f'{settings["num_steps"]!r}')
    return settings
