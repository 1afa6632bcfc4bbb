"""The leaf configs of all families, with their rows of the zoo; the fixtures build their models."""

import copy
from functools import lru_cache

import pytest

from vmamba_mm import zoo
from vmamba_mm.links import CONFIGS

FAMILIES = sorted({entry.family for entry in zoo.entries()})
LEAVES = [f'configs/{path.relative_to(CONFIGS).as_posix()}'
          for family in FAMILIES for path in sorted((CONFIGS / family).glob('*.py'))]
#: A published recipe on another data pipeline, which has no row of its own, -> whose it is.
VARIANTS = {leaf: leaf.replace('-fast_', '_') for leaf in LEAVES if '-fast_' in leaf}


def entry_of(leaf):
    config = VARIANTS.get(leaf, leaf)
    return next(entry for entry in zoo.entries() if entry.config == config)


@pytest.fixture(scope='module')
def load(read_config):
    from mmengine.registry import init_default_scope
    read_once = lru_cache(maxsize=None)(read_config)

    def read(leaf):
        cfg = copy.deepcopy(read_once(leaf))
        init_default_scope(cfg.default_scope)
        return cfg

    return read


@pytest.fixture(scope='module')
def build_meta(load):
    """The model of a config on the meta device: names, shapes and classes without the memory."""
    import torch
    from mmengine.registry import MODELS

    @lru_cache(maxsize=1)
    def build(leaf):
        cfg = load(leaf)
        with torch.device('meta'):
            return MODELS.build(cfg.model)

    return build
