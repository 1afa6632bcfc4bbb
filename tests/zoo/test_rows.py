"""Every row of the zoo, on the meta device: its model takes the official file's names."""

import pytest
import torch
from leaves import LEAVES, entry_of
from official import classifier_state, dense_state

from vmamba_mm.checkpoints.compare import differences
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if entry_of(leaf).family == 'vmamba'])
def test_row_takes_an_official_state_dict(leaf, load):
    from mmengine.registry import MODELS

    from vmamba_mm.models import VMamba

    entry, cfg = entry_of(leaf), load(leaf)
    generation = 1 if 'vanilla' in entry.arch else 2
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        if entry.task == 'cls':
            state = classifier_state(VMamba(entry.arch, out_indices=(3,)), 1000, generation)
        else:
            state = dense_state(VMamba(entry.arch), generation)
            state |= {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    found = to_mm(state)
    assert differences(model.state_dict(), found) == {}
    assert infer_arch(state) == entry.arch
    assert infer_task(found) == entry.task
    if entry.task != 'cls':
        model.load_state_dict(state)  # strict; the backbone takes the official names by itself
