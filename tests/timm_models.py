"""Small models of timm's kind, for the tests of vmamba_mm.timm."""

import pytest
import timm
import torch

import vmamba_mm.timm  # noqa: F401 (registers the models)
from vmamba_mm.families.vmamba import ARCHS

#: one of either kind, small; the entry gives everything that an arch does not
SMALL = {name: dict(ARCHS[name], embed_dims=8, depths=(1, 1, 2, 1), d_state=d_state)
         for name, d_state in (('tiny_s1l8', 1), ('vanilla_tiny', 2))}
BOTH = pytest.mark.parametrize('kind', SMALL)
CHANNELS = [8, 16, 32, 64]


def create(kind='tiny_s1l8', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(f'vmamba_{kind}', **{'arch': SMALL[kind], 'num_classes': 10, **kwargs})


def image(*shape, channels=3):
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(1))


def stage_maps(model, x):
    """What the blocks of each stage give inside the model's own forward, (B, H, W, C)."""
    maps = []
    hooks = [stage.blocks.register_forward_hook(lambda _, __, y: maps.append(y))
             for stage in model.backbone.stages]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return maps
