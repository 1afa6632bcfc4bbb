"""The trainers of nnU-Net: its preprocessing, training and prediction, with a very small data set.

nnU-Net needs another timm than the other tests, so it may be in an environment of its own, which
``make setup-nnunet`` makes.
"""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmamba_mm import nnunet
from vmamba_mm.families.u_mamba import arch_of_plan
from vmamba_mm.models import UMamba

REPO = Path(__file__).resolve().parents[1]
OWN = REPO / '.venv-nnunet/bin/python'
PYTHON = sys.executable if importlib.util.find_spec('nnunetv2') else str(OWN)
TRAINERS = {'nnUNetTrainerUMambaBot', 'nnUNetTrainerUMambaEnc', 'nnUNetTrainerUMambaEncNoAMP'}


def test_the_folder_of_trainers():
    """nnU-Net imports all modules of the folder, as top-level ones, wherever it is installed."""
    printed = subprocess.run([sys.executable, '-m', 'vmamba_mm.nnunet'], cwd=REPO,
                             capture_output=True, text=True, check=True)
    assert printed.stdout == f'{nnunet.TRAINERS}\n' and not printed.stderr
    modules = {p.stem: p for p in nnunet.TRAINERS.iterdir() if p.suffix == '.py'}
    assert set(modules) == {'__init__', 'vmamba_mm_trainers'}
    tree = ast.parse(modules['vmamba_mm_trainers'].read_text())
    public = {node.name: node for node in tree.body
              if isinstance(node, ast.ClassDef) and not node.name.startswith('_')}
    assert set(public) == TRAINERS
    for node in public.values():
        build = next(f for f in node.body if getattr(f, 'name', '') == 'build_network_architecture')
        assert [a.arg for a in build.args.args] == [
            'plans_manager', 'configuration_manager', 'num_input_channels', 'num_output_channels',
            'enable_deep_supervision']


@pytest.fixture
def command(tmp_path):
    """command(step) -> what tests/nnunet_by_command.py prints."""
    if not Path(PYTHON).is_file():
        pytest.skip('nnunetv2 is neither here nor in .venv-nnunet: make setup-nnunet')
    # One process for each thing, since the tests around use the cores.
    environment = dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1',
                       nnUNet_def_n_proc='1')

    def run(step, processes=0):
        done = subprocess.run(
            [PYTHON, REPO / 'tests/nnunet_by_command.py', tmp_path, step],
            env={**environment, 'nnUNet_n_proc_DA': str(processes)}, cwd=tmp_path,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    folder = subprocess.run([PYTHON, '-m', 'vmamba_mm.nnunet'], env=environment, cwd=tmp_path,
                            stdout=subprocess.PIPE, text=True, check=True) \
        .stdout.strip()
    environment['nnUNet_extTrainer'] = folder
    return run


@pytest.mark.slow
def test_by_the_commands_of_nnunet(command, tmp_path):
    command('preprocess', processes=1)  # the planner takes this as a number of threads
    check_networks(command('build'))
    results = tmp_path / 'results/Dataset501_Balls'
    for step, name in (('train_2d', 'UMambaBot__nnUNetPlans__2d'),
                       ('train_3d', 'UMambaEnc__nnUNetPlans__3d_fullres')):
        out = command(step)
        assert 'old build_network_architecture signature' not in out
        assert 'Training done.' in out and 'Mean Validation Dice' in out
        assert (results / f'nnUNetTrainer{name}/fold_all/checkpoint_final.pth').is_file()
    command('predict')
    assert len(list((tmp_path / 'predicted').glob('ball_?.nii.gz'))) == 3
    check_file(tmp_path, results / 'nnUNetTrainerUMambaEnc__nnUNetPlans__3d_fullres/fold_all')


def check_networks(out):
    built = [json.loads(line) for line in re.findall('^BUILT (.*)$', out, re.MULTILINE)]
    assert [(b['trainer'], len(b['size'])) for b in built] == [
        (name, n) for name in ('UMambaBot', 'UMambaEnc', 'UMambaEncNoAMP') for n in (2, 3)]
    for b in built:
        assert b['variant'] == ('bot' if 'Bot' in b['trainer'] else 'enc')
        assert b['blocks'] == [2, 2, 1]  # the plan says 2, 2, 2
        assert b['whole'] == b['maps'][0] == [1, 2, *b['size']] and len(b['maps']) == 2
        assert b['dtype'] == ('torch.float32' if 'NoAMP' in b['trainer'] else 'torch.bfloat16')
        assert not b['scaled']  # on a CPU nnU-Net has no scaler either


def check_file(folder, results):
    """The network alone loads what nnU-Net wrote."""
    plans = json.loads(
        (folder / 'preprocessed/Dataset501_Balls/nnUNetPlans.json').read_text())
    plan = plans['configurations']['3d_fullres']
    kwargs = {key: plan['architecture']['arch_kwargs'][key] for key in (
        'features_per_stage', 'kernel_sizes', 'strides', 'n_conv_per_stage',
        'n_conv_per_stage_decoder')}
    model = UMamba(arch_of_plan('enc', patch_size=plan['patch_size'], **kwargs), num_classes=2)
    before = model.encoder.stem[0].conv1.weight.clone()
    model.load_pretrained(str(results / 'checkpoint_final.pth'))
    assert not torch.equal(model.encoder.stem[0].conv1.weight, before)
    assert model(torch.randn(1, 1, *plan['patch_size'])).shape == (1, 2, *plan['patch_size'])
