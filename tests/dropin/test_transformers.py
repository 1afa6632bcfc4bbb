"""transformers' own models on the ops of this package, beside its slow path."""

import pytest
from with_transformers import run_step

from vmamba_mm.dropin import install_transformers
from vmamba_mm.errors import UserError
from vmamba_mm.integrations.dropin import hugging_face

#: Of each model, what must have been called: in one pass and in training, and with a cache.
CALLS = {
    'mamba': {'mamba_inner_fn', 'mamba_selective_scan', 'mamba_selective_state_update',
              'causal_conv1d_fn', 'causal_conv1d_update'},
    'mamba2': {'mamba2_split_conv1d_scan_combined', 'mamba2_chunk_scan',
               'mamba2_selective_state_update', 'causal_conv1d_fn', 'causal_conv1d_update'}}
CALLS['falcon_mamba'] = CALLS['mamba']
CALLS['mamba_gelu'] = {name for name in CALLS['mamba'] if 'conv' not in name}
CALLS['jamba'] = CALLS['mamba'] - {'mamba_inner_fn'}


def test_same_results_as_the_slow_path(tmp_path):
    """Logits, with padding too, texts from a cache, losses and the gradient of every parameter."""
    found = run_step(tmp_path, 'dropin')
    assert set(found) == set(CALLS)
    for name, results in found.items():
        assert set(results.pop('covered')) == {'mamba', 'falcon_mamba', 'jamba', 'mamba2'}
        assert set(results.pop('calls')) == CALLS[name], name
        assert results.pop('text') == 0, name
        assert results.pop('grad') < 2e-4, name
        assert max(results.values()) < 1e-5, (name, results)


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(hugging_face.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='^transformers is not installed: pip install'):
        install_transformers()
