"""Official checkpoints give the numbers of the official code: ../shared/parity, made on a CPU."""

import pytest
import torch
from official import SHARED

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.models import VMamba
from vmamba_mm.testing import relative_error

PARITY = SHARED / 'parity'
TOLERANCE = 1e-4


@pytest.fixture(params=['s1', 's2', 'vanilla'])
def name(request):
    if not (PARITY / f'{request.param}.cls.pth').is_file():
        pytest.skip(f'no ../shared/parity/{request.param}.cls.pth beside the checkout')
    return request.param


@pytest.fixture
def cases(name):
    return torch.load(PARITY / f'{name}.expected.pt', weights_only=True)['cases']


def build_classifier(mm, file):
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    init_default_scope('mmpretrain')
    arch = read_checkpoint(file)['meta']['arch']
    model = MODELS.build(dict(
        type='ImageClassifier',
        backbone=dict(type='vmamba_mm.VMamba', arch=arch, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=8 * arch['embed_dims'],
                  topk=(1,))))
    load_checkpoint(model, str(file), map_location='cpu')
    return model.eval()


def assert_close(found, expected, what):
    error = relative_error(found, expected)
    print(f'{what}: {error:.1e}')  # seen with pytest -s; the README has the largest
    assert error <= TOLERANCE, f'{what}: {error:.1e}'


def test_logits_and_gradients(mm, name, cases):
    pytest.importorskip('mmpretrain')
    model = build_classifier(mm, PARITY / f'{name}.cls.pth')
    for case in cases:
        image = case['input'].clone().requires_grad_()
        logits = model(image, mode='tensor')
        assert_close(logits, case['logits'], 'logits')
        if 'grad_logits' not in case:
            continue
        logits.backward(case['grad_logits'])
        assert_close(image.grad, case['grad_input'], 'input gradient')
        expected = to_mm(case['grad_params'])
        found = {k: p.grad for k, p in model.named_parameters()}
        assert set(found) == set(expected)
        for key, gradient in expected.items():
            assert_close(found[key], gradient, key)
    assert 'grad_logits' in cases[0]


def test_feature_maps(name, cases):
    file = str(PARITY / f'{name}.dense.pth')
    model = VMamba(read_checkpoint(file)['meta']['arch']).eval()
    model.load_pretrained(file)
    for case in cases:
        with torch.no_grad():
            feats = model(case['input'])
        assert len(feats) == len(case['feats']) == 4
        for i, (found, expected) in enumerate(zip(feats, case['feats'], strict=True)):
            assert_close(found, expected, f'map {i}')


def test_expected_outputs_belong_to_the_averaged_weights(mm, name, cases):
    """So a loader that took 'model' would not pass."""
    states = [read_checkpoint(PARITY / f'{name}.cls.pth', weights)['state_dict']
              for weights in ('auto', 'model_ema', 'model')]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())
