"""The leaf configs of all families, with their rows of the zoo; the fixtures build their models."""

import copy
from functools import lru_cache
from pathlib import Path

import pytest

from vmamba_mm import zoo
from vmamba_mm.paths import CONFIGS

REPO = Path(__file__).resolve().parents[1]
#: One folder for each family; the last one is of the family that is made up.
FOLDERS = [*sorted(path.parent for path in CONFIGS.glob('*/metafile.yml')),
           REPO / 'tests/made_up/configs/ripple']
ENTRIES = [entry for folder in FOLDERS for entry in zoo.read_metafile(folder / 'metafile.yml')
           if entry.config]
LEAVES = [path.relative_to(REPO).as_posix() for folder in FOLDERS
          for path in sorted(folder.glob('*.py'))]
#: A recipe on another data pipeline, or with what only training has, -> the one whose row it has.
VARIANTS = {leaf: leaf.replace(kind, '_') for leaf in LEAVES for kind in ('-fast_', '-distill_')
            if kind in leaf}


def entry_of(leaf):
    path = REPO / VARIANTS.get(leaf, leaf)
    return next(entry for entry in ENTRIES if entry.path == path)


@pytest.fixture(scope='session')
def load(read_config):
    from mmengine.registry import init_default_scope
    read_once = lru_cache(maxsize=None)(read_config)

    def read(leaf):
        cfg = copy.deepcopy(read_once(leaf))
        init_default_scope(cfg.default_scope)
        return cfg

    return read


@pytest.fixture(scope='session')
def build_meta(load):
    """The model of a config on the meta device: names, shapes and classes without the memory."""
    import torch
    from mmengine.registry import MODELS

    from vmamba_mm.mm.cli.runs import model_settings

    @lru_cache(maxsize=1)
    def build(leaf):
        cfg = load(leaf)
        with torch.device('meta'):
            return MODELS.build(model_settings(cfg))

    return build
