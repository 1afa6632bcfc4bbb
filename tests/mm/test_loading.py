"""mmengine is changed where somebody asks for it, and nowhere else."""

import subprocess
import sys

import pytest
import torch
from official import S1, classifier_state, dense_state, random_backbone, save_hostile

SNAPSHOT = """
import mmengine.config.config, mmengine.config.utils, mmengine.hub.hub, mmengine.utils.package_utils
from mmengine.runner import checkpoint, load_checkpoint
import torch

def snapshot():
    modules = (mmengine.config.config, mmengine.config.utils, mmengine.hub.hub, mmengine.utils,
               mmengine.utils.package_utils, checkpoint)
    functions = {(m.__name__, k): v for m in modules for k, v in vars(m).items() if callable(v)}
    return (functions, dict(checkpoint.CheckpointLoader._schemes),
            dict(mmengine.config.utils.MODULE2PACKAGE),
            'HistoryBuffer' in str(torch.serialization.get_safe_globals()))

before = snapshot()
"""


def run(code):
    done = subprocess.run([sys.executable, '-c', SNAPSHOT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    dense = dense_state(random_backbone(S1))
    torch.save(dict(state_dict=dense | {'neck.bias': torch.ones(3)}), folder / 'dense.pth')
    half = {k: v for k, v in dense.items() if 'layers.2' not in k}
    torch.save(dict(state_dict=half), folder / 'half.pth')
    torch.save(dict(model=classifier_state(random_backbone(S1, (3,)), 10)), folder / 'cls.pth')
    save_hostile(folder / 'hostile.pth', dense, folder / 'ran')
    return folder


def test_a_model_changes_nothing_and_looks_after_itself(files):
    """In a process that knows ``type='vmamba_mm.VMamba'`` and nothing else of the package."""
    run(f"""
from pathlib import Path
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from vmamba_mm.errors import UserError

files, arch = Path({str(files)!r}), {S1!r}

class Whole(BaseModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.backbone = MODELS.build(dict(type='vmamba_mm.VMamba', arch=arch, **kwargs))
        self.neck = torch.nn.Linear(1, 3)

def refused(call, *words):
    try:
        call()
    except UserError as err:
        assert all(word in str(err) for word in words), err
    else:
        raise AssertionError('nothing was refused')

held = torch.load(files / 'dense.pth')['state_dict']
name = 'stages.2.blocks.1.ssm.x_proj_weight'
official = held['backbone.layers.2.blocks.1.op.x_proj_weight']

model = Whole()
import vmamba_mm.models, vmamba_mm.registry, vmamba_mm.checkpoints.files, vmamba_mm.zoo
assert snapshot() == before

# Its own weights: strictly, safely, by official names too.
pretrained = Whole(init_cfg=dict(type='Pretrained', checkpoint=str(files / 'dense.pth')))
pretrained.init_weights()
assert torch.equal(pretrained.backbone.get_parameter(name), official)
for file, word in (('hostile.pth', 'not safe to load'), ('half.pth', 'it holds the arch')):
    wrong = Whole(init_cfg=dict(type='Pretrained', checkpoint=str(files / file)))
    refused(wrong.init_weights, file, word)
assert not (files / 'ran').exists()

# The whole model, by mmengine's own loader.
load_checkpoint(model, str(files / 'dense.pth'))
assert torch.equal(model.backbone.get_parameter(name), official)
refused(lambda: load_checkpoint(Whole(), str(files / 'half.pth')), 'does not fit the model')
refused(lambda: load_checkpoint(Whole(), str(files / 'cls.pth')),
        "it holds under 'model' a VMamba at the top, and nothing under 'backbone.'",
        "custom_imports = dict(imports=['vmamba_mm.mm'])")
assert snapshot() == before
""")


def test_the_loader_is_asked_for(files):
    """It reads safely whatever is read, and other models' files come as they are."""
    run(f"""
from pathlib import Path
import vmamba_mm.mm
from mmengine.runner.checkpoint import CheckpointLoader
from vmamba_mm.errors import UserError
assert snapshot() != before
files = Path({str(files)!r})
try:
    CheckpointLoader.load_checkpoint(str(files / 'hostile.pth'), 'cpu')
    raise AssertionError('nothing was refused')
except UserError as err:
    assert 'not safe to load' in str(err)
# At the top of a file: a classifier of ours.
found = CheckpointLoader.load_checkpoint(str(files / 'cls.pth'), 'cpu')
assert 'backbone.stages.0.blocks.0.ssm.Ds' in found['state_dict'], list(found['state_dict'])[:3]
assert 'head.fc.weight' in found['state_dict'] and found['meta']['task'] == 'cls'
# Inside another model: it may be the authors' own, and ours takes these names as well.
found = CheckpointLoader.load_checkpoint(str(files / 'dense.pth'), 'cpu')
held = torch.load(files / 'dense.pth')['state_dict']
assert list(found['state_dict']) == list(held)
assert found['meta']['task'] == 'det' and found['meta']['arch'] == {S1!r}
# Half a model of ours is none, and a model of ours says so.
content = torch.load(files / 'cls.pth')
half = {{k: v for k, v in content['model'].items() if not k.startswith('layers.3.')}}
torch.save(dict(model=half), files / 'half_cls.pth')
from vmamba_mm.models import VMamba
model = torch.nn.Module()
model.backbone = VMamba({S1!r}, (3,))
try:
    load_checkpoint(model, str(files / 'half_cls.pth'))
    raise AssertionError('nothing was refused')
except UserError as err:
    assert "under 'model' a VMamba at the top: the weights are named like" in str(err), err
    assert "but lack 'stages.3.blocks.0.ssm.in_proj.weight'" in str(err), err
# Nothing of ours.
other = dict(model={{'layers.0.blocks.0.op.A_logs': torch.ones(2)}}, x=3)
torch.save(other, files / 'other.pth')
found = CheckpointLoader.load_checkpoint(str(files / 'other.pth'), 'cpu')
assert found.keys() == other.keys() and list(found['model']) == list(other['model'])
""")
