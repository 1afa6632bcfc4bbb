"""The demo of super-resolution: whole photographs held out, bicubic beside the model, the floor."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

for package in ('mlxtend', 'skimage', 'sklearn'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'demo')", allow_module_level=True)

CONFIG = CONFIGS / 'demo' / 'mambair_photographs-x2.py'
TOOLS = 'make_data', 'scenes', 'photographs', 'super_resolution', 'run'


@pytest.fixture(scope='module')
def tools():
    """With two photographs to learn from."""
    with loading_tools() as load:
        found = {name: load(f'demo/{name}.py') for name in TOOLS}
        photos = found['scenes'].PHOTOS
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(photos, 'train', photos['train'][:2])
            found['scenes'].load_photos.cache_clear()
            yield found


@pytest.fixture(scope='module')
def root(tools, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools['make_data'].build(path, tools['make_data'].DEFAULTS, ['photographs'])
    return path / 'photographs'


def test_small_photographs_are_those_of_the_large_ones(root, tools):
    photographs = tools['photographs']
    assert photographs.list_names(root, 'val') == ['chelsea', 'china']
    for name in photographs.list_names(root, 'val'):
        large, small = photographs.read_pair(root, 'val', name)
        means = large.reshape(small.shape[0], 2, small.shape[1], 2, 3).mean((1, 3))
        assert np.abs(means - small).mean() < 3  # no shift
        assert np.abs(means[:, 1:] - small[:, :-1]).mean() > 2 * np.abs(means - small).mean()


def test_bicubic_and_its_score(root, tools):
    demo = tools['super_resolution']
    large, small = tools['photographs'].read_pair(root, 'val', 'chelsea')
    found = demo.bicubic(small)
    assert found.shape == large.shape
    psnr, ssim = demo.score(found, large)
    nearest = demo.score(small.repeat(2, 0).repeat(2, 1), large)
    assert nearest[0] < psnr < 40 and nearest[1] < ssim < 1
    blurred = large.copy()
    blurred[40:40 + demo.PART, 30:30 + demo.PART] = 0
    assert demo.busiest(large, blurred) == (40, 30)


@pytest.mark.parametrize('is_right', [True, False])
def test_the_demo_from_end_to_end(tools, is_right, tmp_path, monkeypatch, capsys):
    """With a model that is made up: what is said, drawn and refused."""
    from PIL import Image

    demo, work_dir = tools['super_resolution'], tmp_path / 'work'

    def train(config, folder):
        folder.mkdir(parents=True)
        Image.new('RGB', (80, 30)).save(folder / 'curves.png')
        return 1.0, folder / 'last.pth'

    def run(name, log, *command):
        folder = work_dir / 'restored'
        folder.mkdir()
        for path in command[3:-2]:
            Image.open(str(path).replace('LR', 'HR').replace('x2', '')).save(folder / path.name)

    psnr = 40.0 if is_right else 31.5
    for name, function in dict(train=train, run=run, evaluate=lambda *names: (
            1.0, dict(psnr=psnr, ssim=0.95))).items():
        monkeypatch.setattr(demo, name, function)
    monkeypatch.setattr(tools['run'], 'ROOT', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['super_resolution.py', '--work-dir', str(work_dir)])
    monkeypatch.chdir(tmp_path)  # main() goes to ROOT
    with contextlib.nullcontext() if is_right else pytest.raises(SystemExit, match='above bicubic'):
        demo.main()
    said = capsys.readouterr().out
    assert f'PSNR {psnr:.2f} dB and SSIM 0.9500 of 2 held-out photographs' in said
    assert f'{psnr - 31.338:.2f} dB above bicubic, 31.34 dB' in said
    assert (work_dir / 'report.png').is_file()
    assert sorted(p.name for p in (work_dir / 'predictions').iterdir()) == [
        'chelsea.png', 'china.png']


def test_config_builds_and_reads_the_set(root):
    from mmengine.registry import DATASETS, init_default_scope

    cfg = cli.load_config(str(CONFIG))
    init_default_scope(cfg.default_scope)
    model = cli.build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) < 50_000
    for loader, count in ((cfg.train_dataloader, 2), (cfg.test_dataloader, 2)):
        loader.dataset.data_root = loader.dataset.data_root.replace('data/demo/photographs',
                                                                    str(root))
        dataset = DATASETS.build(loader.dataset)
        sample = dataset[0]
        assert len(dataset) == count
        gt, inputs = sample['data_samples'].gt, sample['inputs']
        assert gt.shape[1:] == tuple(2 * side for side in inputs.shape[1:])
        assert torch.is_tensor(inputs) and 0 <= inputs.min() and inputs.max() <= 1
