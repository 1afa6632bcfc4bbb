"""The inferencers of mmpretrain, mmdet and mmseg on official files, in processes of their own."""

import pickle

import numpy as np
import pytest
import torch
from official import save_hostile
from zoo_helpers import assert_detections, assert_scores, official_input

from vmamba_mm import zoo

CONFIG = zoo.entries('vmamba', 'tiny_s2l5', 'cls')[0].path

# As a user writes it: nothing of this package is imported but by the config.
SCRIPT = """
import pickle
import sys

{imports}

assert 'vmamba_mm.models' not in sys.modules
_, config, weights, image, out = sys.argv
inferencer = {call}
results = inferencer(image{more})
with open(out, 'wb') as f:
    pickle.dump({keep}, f)
"""
INFERENCERS = {
    'cls': dict(imports='from mmpretrain import ImageClassificationInferencer, get_model',
                call="ImageClassificationInferencer(model=config, pretrained=weights, "
                     "device='cpu')",
                more='', keep='results[0]'),
    'det': dict(imports='from mmdet.apis import DetInferencer',
                call="DetInferencer(model=config, weights=weights, device='cpu')",
                more='', keep="results['predictions'][0]"),
    'seg': dict(imports='from mmseg.apis import MMSegInferencer',
                call="MMSegInferencer(model=config, weights=weights, device='cpu')",
                more='', keep="results['predictions']"),
}


@pytest.fixture
def infer(run, strip, tmp_path):
    """infer(task, config, weights) -> what the inferencer of a new process returns."""

    def infer(task, config, weights, fails=False):
        script, result = tmp_path / 'script.py', tmp_path / 'result.pkl'
        script.write_text(SCRIPT.format(**INFERENCERS[task]))
        _, err = run(script, config, weights, strip, result, fails=fails)
        return err if fails else pickle.loads(result.read_bytes())

    return infer


@pytest.mark.slow
def test_det_inferencer(dense, infer, strip):
    one = dense('det')
    assert_detections(infer('det', one.config, one.file), one.predict(strip).pred_instances)


@pytest.mark.slow
def test_seg_inferencer(dense, infer, strip):
    one = dense('seg')
    found = infer('seg', one.config, one.file)
    expected = one.predict(strip).pred_sem_seg.data[0].numpy()
    assert found.shape == expected.shape and len(np.unique(expected)) > 3
    assert (found == expected).mean() > 0.99


@pytest.mark.slow
def test_cls_inferencer(tiny_file, infer, strip, mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    file, model, state = tiny_file
    found = infer('cls', CONFIG, file)
    x = official_input(strip)
    with torch.no_grad():
        pooled = model(x)[0].mean((2, 3))
        logits = torch.nn.functional.linear(pooled, state['classifier.head.weight'],
                                            state['classifier.head.bias'])
        ours = mmpretrain.get_model(str(CONFIG), pretrained=str(file))(x)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert_scores(torch.as_tensor(found['pred_scores'])[None], logits.softmax(1))
    assert found['pred_label'] == logits.argmax().item()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_inferencers_refuse_hostile_files(task, infer, big, narrow):
    """mmengine's own loader would run them: they are refused though nothing was imported."""
    witness = big / 'ran'
    file = save_hostile(big / 'a.pth', {'a': torch.zeros(1)}, witness)
    err = infer(task, narrow(task, 'tiny_s1l8')[0], file, fails=True)
    assert 'UserError' in err and 'is not safe to load' in err
    assert not witness.exists()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_inferencers_refuse_another_variant(task, dense, infer, narrow):
    config, _ = narrow(task, 'tiny_s1l8', depths=(1, 1, 1, 1))
    err = infer(task, config, dense(task).file, fails=True)
    assert "it holds the arch {'embed_dims': 16" in err and 'and the model has another' in err


@pytest.mark.slow
def test_cls_inferencer_refuses_another_variant(tiny_file, infer):
    config = zoo.entries('vmamba', 'tiny_s1l8', 'cls')[0].path
    err = infer('cls', config, tiny_file[0], fails=True)
    assert "it holds the arch 'tiny_s2l5', and the model is 'tiny_s1l8'" in err
