"""Cobra (arXiv 2403.14520): a language model of Mamba that sees images through two vision towers.

Towers and language model are other libraries' and :mod:`vmamba_mm.families.mamba_lm`'s; what is
Cobra's own is the projector between them, whose names and numbers are here, and the file that holds
both.
"""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.parity import Build, Options, Parity, Subject

#: The class in the official code -> ``kind`` of :class:`vmamba_mm.layers.Projector`.
PROJECTORS = {'LinearProjector': 'linear', 'MLPProjector': 'mlp',
              'FusedMLPProjector': 'fused-gelu-mlp', 'LDPProjector': 'ldp',
              'FusedLDPProjector': 'fused-ldp'}
#: Where an official file has the projector and the language model.
PROJECTOR, LANGUAGE = ('model', 'projector'), ('model', 'llm_backbone')


def _subject(file: str, options: Options) -> Subject:
    kwargs = options['kwargs']
    build = Build('vmamba_mm.layers:Projector', dict(
        in_dims=kwargs['vision_dim'], out_dims=kwargs['llm_dim'],
        kind=PROJECTORS[kwargs['kind']]))
    return Subject(build, convert=_same, within=PROJECTOR)


def _same(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names of the layer are the official ones."""
    return weights


PARITY = Parity(subject=_subject)
