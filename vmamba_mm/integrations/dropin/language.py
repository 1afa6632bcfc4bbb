"""What models import from ``mamba_ssm.utils`` beside their mixers."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vmamba_mm.errors import UserError


@dataclass
class InferenceParams:
    """What a model that decodes passes to its layers, and where they keep their states."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class GenerationMixin:
    """A base class of models that import it; ``generate`` is not covered."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int,
                                 dtype: torch.dtype | None = None, **kwargs):
        raise NotImplementedError

    def generate(self, *args, **kwargs):
        raise NotImplementedError('GenerationMixin.generate is not covered by vmamba_mm.dropin; '
                                  'decode with inference_params, or use vmamba_mm.models.CausalLM')


def load_config_hf(model_name: str) -> dict:
    """``config.json`` of a folder; nothing is downloaded."""
    return json.loads(_file_of(model_name, 'config.json').read_text())


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None
                       ) -> dict[str, Tensor]:
    """``pytorch_model.bin`` of a folder, read without running its pickle; nothing is downloaded."""
    state = torch.load(_file_of(model_name, 'pytorch_model.bin'), 'cpu', weights_only=True)
    return {name: tensor.to(device, dtype) for name, tensor in state.items()}


def _file_of(folder: str, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f'{path} does not exist: vmamba_mm.dropin reads a model from a folder with '
                        'config.json and pytorch_model.bin; download it first')
    return path
