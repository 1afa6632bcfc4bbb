"""The demo of medicine: heads in which brightness tells nothing, the same each time; its scores."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

for package in ('nibabel', 'mlxtend', 'skimage', 'sklearn'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extras 'demo' and 'monai')",
                    allow_module_level=True)


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield {name: load(f'demo/{name}.py')
               for name in ('make_data', 'volumes', 'medical', 'run')}


@pytest.fixture(scope='module')
def settings(tools):
    return {**tools['make_data'].DEFAULTS, 'heads': (3, 1)}


@pytest.fixture(scope='module')
def root(tools, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools['make_data'].build(path, settings, ['heads'])
    return path / 'heads'


def heads(root, tools, split='train'):
    return [tools['volumes'].read_head(case) for case in sorted((root / split).iterdir())]


def test_the_same_heads_each_time(root, tools, settings, tmp_path):
    tools['make_data'].build(tmp_path, settings, ['heads'])
    first, again = heads(root, tools), heads(tmp_path / 'heads', tools)
    assert all(np.array_equal(a, b) for x, y in zip(first, again, strict=True)
               for a, b in zip(x, y, strict=True))
    assert not np.array_equal(first[0][0], first[1][0])


def test_brightness_alone_tells_little(root, tools):
    """Of the class that a voxel of its brightness has most often."""
    medical = tools['medical']
    ranges = medical.best_thresholds(sorted((root / 'train').iterdir()))
    for volume, mask in heads(root, tools, 'val'):
        scores = medical.dice(medical.threshold(volume, ranges), mask)
        assert set(scores) == {'ventricles', 'tumour'} and max(scores.values()) < 0.5


def test_thresholds_are_the_best(root, tools):
    """Of what is brighter than all else, they find the range."""
    medical, cases = tools['medical'], sorted((root / 'train').iterdir())
    volumes = tools['volumes']
    low, high = medical.best_thresholds(cases)[2]
    values, masks = (np.concatenate([volumes.read_head(case)[i].ravel() for case in cases])
                     for i in (0, 1))

    def score(a, b):
        pred = (values >= a) & (values < b)
        return 2 * (pred & (masks == 2)).sum() / (pred.sum() + (masks == 2).sum())

    assert score(low, high) >= max(score(low - 0.1, high), score(low + 0.1, high),
                                   score(low, high - 0.1), score(low, 9.0)) > 0


def test_dice(tools):
    mask = np.array([0, 1, 1, 2])
    assert tools['medical'].dice(np.array([0, 1, 0, 2]), mask) == pytest.approx(
        dict(ventricles=2 / 3, tumour=1.0))


@pytest.mark.parametrize('is_right', [True, False])
def test_the_demo_from_end_to_end(tools, settings, is_right, tmp_path, monkeypatch, capsys):
    """With models that are made up: what is said, drawn and refused."""
    from PIL import Image

    medical, volumes, work_dir = tools['medical'], tools['volumes'], tmp_path / 'work'
    root = tmp_path / 'data/demo/heads/val'

    def train(config, folder, name):
        folder.mkdir(parents=True)
        Image.new('RGB', (80, 30)).save(folder / 'curves.png')
        return 1.0, folder / f'{name}.pth'

    def of_volume(cfg, model):
        return {case.name: volumes.read_head(case)[1] for case in root.iterdir()}

    def of_slices(model, volume):
        mask, = of_volume(None, model).values()
        return mask if is_right else np.zeros_like(mask)

    for name, function in dict(train=train, load_model=lambda *names: names, by_volume=of_volume,
                               by_slices=of_slices).items():
        monkeypatch.setattr(medical, name, function)
    monkeypatch.setattr(tools['run'], 'ROOT', tmp_path)
    monkeypatch.setattr(tools['make_data'], 'DEFAULTS', settings)
    monkeypatch.setattr(sys, 'argv', ['medical.py', '--work-dir', str(work_dir)])
    monkeypatch.chdir(tmp_path)  # main() goes to ROOT
    with contextlib.nullcontext() if is_right else pytest.raises(SystemExit, match='VM-UNet, sl'):
        medical.main()
    said = capsys.readouterr().out
    assert 'SegMamba, volumes: mean Dice 1.000 of 1 held-out heads (floor 0.75)' in said
    assert f'VM-UNet, slices: mean Dice {float(is_right):.3f} of 1 held-out' in said
    assert (work_dir / 'report.png').is_file()
    assert [p.name for p in (work_dir / 'predictions').iterdir()] == ['head000.png']


@pytest.mark.parametrize('name', ['segmamba_heads-32', 'vm-unet_slices-64'])
def test_configs_build_and_read_the_set(name, root):
    from mmengine.registry import DATASETS, init_default_scope

    cfg = cli.load_config(str(CONFIGS / 'demo' / f'{name}.py'))
    init_default_scope(cfg.default_scope)
    cli.build_model(cfg)
    for loader, count in ((cfg.train_dataloader, 3), (cfg.test_dataloader, 1)):
        settings = loader.dataset
        settings.data_root = settings.data_root.replace('data/demo/heads', str(root))
        dataset = DATASETS.build(settings)
        assert len(dataset) == (count * 32 if 'slices' in name else count)
        sample = dataset[0]
        assert sample['inputs'].shape == {
            'vm-unet_slices-64': (3, 64, 64)}.get(name, (1, 32, *[32 if count == 3 else 64] * 2))
