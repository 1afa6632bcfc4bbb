"""DiS as a model of diffusers."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch
from vmamba_mm.families.dis import DEFAULTS, FAMILY
from vmamba_mm.models import DiS
from vmamba_mm.models.dis import SkipBlock

#: Keys of an arch -> arguments here, as diffusers calls them.
_NAMES = dict(image_size='sample_size', embed_dims='hidden_size', depth='num_layers')


class DiS2DModel(DiS, ModelMixin, ConfigMixin):
    """:class:`vmamba_mm.models.DiS` with diffusers' methods: ``from_pretrained``,
    ``save_pretrained`` (safetensors), ``config``, ``enable_gradient_checkpointing``.

    Weights have the names of the public code, so that its files fit as they are
    (:meth:`from_checkpoint`).

    Args:
        sample_size: pixels, or a latent's, of a side.
        patch_size: of a patch.
        in_channels: 3 of images, 4 of latents.
        hidden_size: C.
        num_layers: blocks but for the middle one.
        num_classes: 0 for a model without classes.
        learn_sigma: whether the variance is predicted beside the noise.
        skip, norm, d_state, d_conv, expand, dt_rank: as of :class:`vmamba_mm.models.DiS`.
        drop_path_rate: stochastic depth of the last block.

    Raises:
        ValueError: on a value that is not allowed.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ['SkipBlock']
    _repeated_blocks = ['SkipBlock']

    @register_to_config
    def __init__(self, sample_size: int = 32, patch_size: int = 2, in_channels: int = 4,
                 hidden_size: int = 368, num_layers: int = 24, num_classes: int = 1000,
                 learn_sigma: bool = True, skip: bool = True, norm: str = 'rms', d_state: int = 16,
                 d_conv: int = 4, expand: float = 2, dt_rank: int | str = 'auto',
                 drop_path_rate: float = 0.0):
        options = dict(learn_sigma=learn_sigma, skip=skip, norm=norm, d_state=d_state,
                       d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        DiS.__init__(self, dict(
            image_size=sample_size, patch_size=patch_size, in_channels=in_channels,
            embed_dims=hidden_size, depth=num_layers, num_classes=num_classes,
            **{key: value for key, value in options.items() if value != DEFAULTS[key]}),
            drop_path_rate)

    @classmethod
    def from_arch(cls, arch: str | Mapping[str, Any], drop_path_rate: float = 0.0) -> 'DiS2DModel':
        """The model of an architecture of :class:`vmamba_mm.models.DiS`, with random weights."""
        settings = resolve_arch(FAMILY, arch)
        return cls(**{_NAMES.get(key, key): value for key, value in settings.items()},
                   drop_path_rate=drop_path_rate)

    @classmethod
    def from_checkpoint(cls, checkpoint: str | os.PathLike, weights: str = 'auto') -> 'DiS2DModel':
        """The model in a file of the public code, or of mmengine's Runner, in eval mode.

        Args:
            checkpoint, weights: as of :func:`vmamba_mm.checkpoints.files.read_checkpoint`; 'auto'
                takes the averaged weights where a file has both.

        Raises:
            UserError: if it cannot be read or holds no such model.
        """
        state = read_checkpoint(checkpoint, weights, family=FAMILY)
        model = cls.from_arch(infer_arch(state.get('state_dict', state), FAMILY))
        model.load_pretrained(str(checkpoint), weights=weights)
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """diffusers' own, which would only warn, but strictly: with all weights, or none.

        Raises:
            UserError: if a weight is missing, left over or of another shape.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f'{name} ({kind.removesuffix("_keys")})' for kind in (
            'missing_keys', 'unexpected_keys', 'mismatched_keys') for name in info.get(kind, ())]
        if wrong:
            raise UserError(f'{args[0]} does not fit its own config.json: {", ".join(wrong[:3])}'
                            + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''))
        return (model, info) if output_loading_info else model

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None,
                return_dict: bool = True) -> Transformer2DModelOutput | tuple[Tensor]:
        """The noise, and with ``learn_sigma`` beside it what the variance is made of.

        Args:
            sample: (B, in_channels, sample_size, sample_size).
            timestep: (B), or one for all.
            class_labels: (B), ``num_classes`` for none; of a model without classes None.
            return_dict: whether the result has the attribute ``sample``, or is a tuple.
        """
        out = DiS.forward(self, sample, timestep, class_labels)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def forward_with_cfg(self, x: Tensor, timesteps: Tensor | float, labels: Tensor,
                         cfg_scale: float = 1.5, guided_channels: int | None = 3) -> Tensor:
        half = x[:len(x) // 2]
        out, = self(torch.cat((half, half)), timesteps, labels, return_dict=False)
        return self.guide(out, cfg_scale, guided_channels)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None):
        for module in self.modules():
            if isinstance(module, SkipBlock):
                module.with_cp = enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(m.with_cp for m in self.modules() if isinstance(m, SkipBlock))

    def _load_from_state_dict(self, *args, **kwargs):
        # diffusers loads files in parts, of which it says itself what is missing.
        nn.Module._load_from_state_dict(self, *args, **kwargs)


# Where users, and the files of pipelines, find it.
DiS2DModel.__module__ = 'vmamba_mm.diffusers'
