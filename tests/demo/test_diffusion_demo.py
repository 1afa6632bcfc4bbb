"""The demo of diffusion: the same digits each time, what is said of samples, a tiny run."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

for package in ('mlxtend', 'skimage', 'sklearn', 'diffusers'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extras 'demo' and 'diffusion')",
                    allow_module_level=True)

CONFIG = CONFIGS / 'demo' / 'dis_digits-8.py'
TOOLS = 'make_data', 'small_digits', 'diffusion', 'report', 'run', 'screen', 'scenes'


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield {name: load(f'demo/{name}.py') for name in TOOLS}


@pytest.fixture(scope='module')
def settings(tools):
    return {**tools['make_data'].DEFAULTS, 'digits_per_class': (6, 9)}


@pytest.fixture(scope='module')
def root(tools, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools['make_data'].build(path, settings, ['digits'])
    return path / 'digits'


def test_digits_keep_their_class(root, tools):
    """And are those of scikit-learn, in 8 bits."""
    from sklearn.datasets import load_digits

    source = load_digits()
    names = sorted(tools['scenes'].CLASSES)
    for split, count in (('train', 6), ('val', 9)):
        found, classes = tools['small_digits'].read(root, split)
        assert found.shape == (10 * count, 8, 8) and np.bincount(classes).tolist() == [count] * 10
        paths = sorted((root / split).glob('*/*.png'))
        for path, image, label in zip(paths, found, classes, strict=True):
            number = int(path.stem.split('_')[1])
            name = tools['scenes'].CLASSES[source.target[number]]
            assert names[label] == path.parent.name == name
            assert np.abs(image - source.images[number] * 255 / 16).max() <= 0.5


def test_a_digit_of_another_class_is_found(tools, settings, root, tmp_path):
    tools['make_data'].build(tmp_path, settings, ['digits'])
    path = next((tmp_path / 'digits/val/one').iterdir())
    path.rename(path.with_name('one_0000.png'))  # which is a zero
    with pytest.raises(SystemExit, match='is of another class'):
        tools['small_digits'].verify(tmp_path / 'digits', settings, tools['make_data'].check)


def test_distances(tools):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8), np.uint8)
    found = tools['diffusion'].distances(images, images[:2])
    expected = np.sqrt(((images[:, None] / 255 - images[None, :2] / 255) ** 2).mean((2, 3)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    labels = np.array([0, 1, 0, 1, 1])
    two = [[0, 2]], [[1, 3], [1, 4], [3, 4]]
    all_apart = tools['diffusion'].distances(images, images)
    mean = np.mean([np.mean([all_apart[i, j] for i, j in pairs]) for pairs in two])
    assert tools['diffusion'].apart(images, labels) == pytest.approx(mean)


def test_the_classifier_tells_digits(tools):
    """On the real ones of the demo, half of them for training."""
    images, labels = tools['small_digits'].load_digits()
    diffusion = tools['diffusion']
    found = diffusion.train_classifier(images[:500], labels[:500])
    assert found.score(diffusion.flat(images[500:800]), labels[500:800]) > 0.8


def test_config_fits_the_set(tools):
    cfg = cli.load_config(str(CONFIG))
    dataset, arch = cfg.train_dataloader.dataset, cfg.model.backbone.arch
    assert dataset.data_root == 'data/demo/digits' and dataset.data_prefix == 'train'
    assert arch.image_size == tools['small_digits'].SIDE
    assert cfg.model.diffusion.beta_end == tools['diffusion'].BETA_END
    assert arch.num_classes == len(tools['scenes'].CLASSES) and arch.in_channels == 1
    assert not any('Flip' in step.type for step in dataset.pipeline)


def test_a_tiny_run(root, tools, call, tmp_path):
    """Train, and make digits by a pipeline that was saved."""
    code, out, err = call(
        'train.py', CONFIG, '--work-dir', 'run', '--cfg-options', 'train_cfg.max_epochs=1',
        'param_scheduler=[]', 'train_dataloader.batch_size=20',
        'default_hooks.checkpoint.interval=1',
        'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        f'train_dataloader.dataset.data_root={root}')
    assert code == 0, err[-2000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools['diffusion'], 'COUNT', 2)
        patch.setattr(tools['diffusion'], 'STEPS', 2)
        made, asked = tools['diffusion'].make(tmp_path / 'run/epoch_1.pth', tmp_path / 'pipeline')
    assert made.shape == (20, 8, 8) and made.dtype == np.uint8
    assert asked.tolist() == [*range(10)] * 2
    assert (tmp_path / 'pipeline/model/diffusion_pytorch_model.safetensors').is_file()


@pytest.mark.parametrize('right, ends', [(30, None), (15, 'below the floor of 70 %')])
def test_the_demo_from_end_to_end(tools, settings, right, ends, tmp_path, monkeypatch, capsys):
    """With a model that copies held-out digits, ``right`` of 30 of the class that is asked for."""
    from PIL import Image

    work_dir, diffusion = tmp_path / 'work', tools['diffusion']

    def run(name, log, *command):
        assert name == 'train' and command[:2] == ('tools/train.py', diffusion.CONFIG)
        work_dir.mkdir()
        (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_9.pth\n')
        return 1.0

    def make(checkpoint, folder):
        assert checkpoint == work_dir / 'epoch_9.pth' and folder == work_dir / 'pipeline'
        images, labels = tools['small_digits'].read(tmp_path / 'data/demo/digits', 'train')
        asked = np.concatenate([labels[:right], (labels[right:] + 1) % 10])
        return images, asked

    monkeypatch.setattr(tools['run'], 'run', run)
    monkeypatch.setattr(diffusion, 'make', make)
    monkeypatch.setattr(tools['run'], 'ROOT', tmp_path)
    monkeypatch.setattr(tools['make_data'], 'DEFAULTS', {**settings, 'digits_per_class': (3, 9)})
    monkeypatch.setattr(sys, 'argv', ['diffusion.py', '--work-dir', str(work_dir)])
    monkeypatch.chdir(tmp_path)  # main() goes to ROOT
    with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
        diffusion.main()
    said = capsys.readouterr().out
    assert f'{100 * right / 30:.1f} % of 30 new digits are of the class that was asked for' in said
    assert 'training set new ones are 0.000 away' in said  # they are copies
    assert f'everything on one page: {work_dir}/report.png' in said
    assert len(list((work_dir / 'predictions').iterdir())) == 2
    with Image.open(work_dir / 'report.png') as page:
        assert page.height > 2 * 96
