"""The demo of changes: exact masks, a difference that tells little, the same pairs each time."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

for package in ('mlxtend', 'skimage', 'sklearn'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'demo')", allow_module_level=True)

CONFIG = CONFIGS / 'demo' / 'rsm-cd_pairs-96.py'
TOOLS = 'make_data', 'pairs', 'change', 'thresholds', 'report', 'run', 'screen'


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield {name: load(f'demo/{name}.py') for name in TOOLS}


@pytest.fixture(scope='module')
def settings(tools):
    return {**tools['make_data'].DEFAULTS, 'pairs': (24, 60)}


@pytest.fixture(scope='module')
def root(tools, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools['make_data'].build(path, settings, ['pairs'])
    return path / 'pairs'


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*.png'))}


def test_the_same_pairs_each_time(root, tools, settings, tmp_path):
    tools['make_data'].build(tmp_path, settings, ['pairs'])
    assert content(tmp_path / 'pairs') == content(root)
    assert len(set(content(root).values())) > 2 * (24 + 60)


def test_a_roof_that_changed_is_in_one_date(tools):
    """In the same light, without a shift, noise and roofs that stay, nothing else differs."""
    pairs, found = tools['pairs'], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, 'relight', lambda rng, image: image)
        patch.setattr(pairs, 'as_pixels', lambda rng, image: image[4:-4, 4:-4])
        patch.setattr(pairs.ndimage, 'shift', lambda image, *_, **__: image)
        for seed in range(8):
            first, second, mask = pairs.draw_pair(np.random.default_rng(seed), 'train', 96,
                                                  (12, 32), 2, 2)
            apart = np.abs(first - second).max(-1)
            edge = tools['pairs'].ndimage.binary_dilation(mask, iterations=2)
            assert set(np.unique(mask)) <= {0, 255} and apart[~edge].max() == 0
            if mask.any():
                found += 1
                assert apart[mask > 0].mean() >= 0.9 * pairs.CONTRAST
    assert found >= 6


def test_roofs_stay_in_the_image_and_apart(tools):
    pairs, rng = tools['pairs'], np.random.default_rng(0)
    ground = np.zeros((104, 104, 3), np.float32)
    roofs = pairs.place_roofs(rng, 'train', ground, 4, (12, 32))
    assert len(roofs) >= 3
    assert np.sum([alpha >= 0.5 for alpha, _ in roofs], axis=0).max() == 1
    for alpha, piece in roofs:
        assert alpha[[0, -1]].max() == alpha[:, [0, -1]].max() == 0 and alpha.max() == 1
        assert 12 * 12 * 0.8 < alpha.sum() < 32 * 32 * 1.1 and piece.shape == ground.shape


def test_a_wrong_label_is_found(tools, root, settings, tmp_path):
    from PIL import Image

    tools['make_data'].build(tmp_path, settings, ['pairs'])
    for path in (tmp_path / 'pairs/val/label').iterdir():
        label = np.asarray(Image.open(path))
        Image.fromarray(label[::-1].copy()).save(path)
    with pytest.raises(SystemExit, match='val: labels'):
        tools['pairs'].verify(tmp_path / 'pairs', settings, tools['make_data'].check)


def test_the_difference_alone_tells_little(root, tools):
    """More than nothing, and less than the floor of the demo."""
    change, thresholds = tools['change'], tools['thresholds']
    limits = thresholds.best_range(*change.differences(root, 'train'), change.BINS)
    apart, masks = change.differences(root, 'val')
    share = 100 * masks.mean()
    best = change.f1(thresholds.within(apart, limits), masks)
    assert 2 * share < best < change.FLOOR
    # It is the light that is taken out.
    first, second, _ = tools['pairs'].read_pair(root, 'train', '0000.png')
    assert change.difference(first, 0.5 * first + 20).max() < 1e-6 < change.difference(
        first, second).max()


def test_the_best_range(tools):
    """The one between two edges that no other one beats."""
    thresholds, rng = tools['thresholds'], np.random.default_rng(0)
    values, bins = rng.uniform(0, 10, (20, 30)), np.arange(11)
    truth = (values > 6.2) & (rng.random(values.shape) < 0.8)

    def score(limits):
        return tools['change'].f1(thresholds.within(values, limits), truth)

    best = thresholds.best_range(values, truth, bins)
    assert best == (6, 10) and score(best) == max(
        score((low, high)) for low in bins for high in bins)


def test_f1(tools):
    masks = np.array([[True, True, False, False]])
    assert tools['change'].f1(np.array([[True, False, True, False]]), masks) == 50
    assert tools['change'].f1(~masks & masks, masks & ~masks) == 0


def test_panel_marks_the_class(tools):
    image = np.full((3, 4, 3), 100, np.uint8)
    labels = np.zeros((3, 4), int)
    labels[0, 1] = 1
    page = tools['report'].panel(image, labels, {1: (200, 0, 50)}, 'title', scale=2)
    assert page.size == (8, 6 + 26)
    assert page.getpixel((0, 0)) == (100,) * 3 and page.getpixel((2, 0)) == (160, 40, 70)


def test_numbers_of_the_class_are_shown(tools):
    for name in ('Precision', 'Recall', 'F1', 'IoU'):
        assert tools['screen'].shown(f'{name} = 71.2')
    assert tools['screen'].shown('IoU of another = 3') is None


def test_a_tiny_run(root, call, tmp_path):
    """Train, evaluate and predict, on the tiny set."""
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=8',
               f'train_dataloader.dataset.dataset.data_root={root}',
               *(f'{name}_dataloader.dataset.{setting}' for name in ('val', 'test')
                 for setting in (f'data_root={root}', 'indices=4'))]
    code, out, err = call('train.py', CONFIG, '--work-dir', 'run', *options)
    assert code == 0, err[-2000:]
    code, out, err = call('test.py', CONFIG, 'run/epoch_1.pth', '--work-dir', 'test', *options)
    assert code == 0 and 'F1 = ' in out, err[-2000:]
    names = [root / 'val' / side / '0003.png' for side in 'AB']
    code, out, err = call('predict.py', CONFIG, 'run/epoch_1.pth', names[0], '--after', names[1],
                          '--out-dir', 'drawn', *options)
    assert code == 0 and (tmp_path / 'drawn/0003.png').is_file(), err[-2000:]


@pytest.mark.parametrize('score, ends', [(97.0, None), (40.0, 'F1 below 60')])
def test_the_demo_from_end_to_end(tools, settings, score, ends, tmp_path, monkeypatch, capsys):
    """With tools that are made up: what is run, said, drawn and refused."""
    from PIL import Image

    work_dir, done = tmp_path / 'work', []

    def run(name, log, *command):
        done.append(name)
        if name == 'train':
            work_dir.mkdir()
            (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_9.pth\n')
        elif name == 'evaluate':
            (work_dir / 'metrics.json').write_text(
                f'{{"F1": {score}, "Precision": 98, "Recall": 96, "IoU": 94}}')
        else:
            assert command[1:3] == (tools['change'].CONFIG, work_dir / 'epoch_9.pth')
            (work_dir / 'drawn').mkdir()
            for path in command[3:command.index('--after')]:
                Image.open(path).save(work_dir / 'drawn' / path.name)
        return 1.0

    for module in (tools['run'], tools['change']):
        monkeypatch.setattr(module, 'run', run)
    monkeypatch.setattr(tools['run'], 'ROOT', tmp_path)
    monkeypatch.setattr(tools['make_data'], 'DEFAULTS', settings)
    monkeypatch.setattr(sys, 'argv', ['change.py', '--work-dir', str(work_dir)])
    monkeypatch.chdir(tmp_path)  # main() goes to ROOT
    with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
        tools['change'].main()
    assert done == ['train', 'evaluate', 'predict']
    said = capsys.readouterr().out
    assert f'F1 {score} of what changed in 60 held-out pairs (floor 60)' in said
    assert f'everything on one page: {work_dir}/report.png' in said
    assert len(list((work_dir / 'predictions').iterdir())) == 3
    with Image.open(work_dir / 'report.png') as page:
        assert page.height > 3 * 96


def test_config_fits_the_set(tools):
    cfg = cli.load_config(str(CONFIG))
    settings = cfg.train_dataloader.dataset.dataset, cfg.val_dataloader.dataset, \
        cfg.test_dataloader.dataset
    for dataset, split in zip(settings, ('train', 'val', 'val'), strict=True):
        assert dataset.data_root == 'data/demo/pairs'
        assert list(dataset.data_prefix.values()) == [
            f'{split}/{folder}' for folder in tools['pairs'].FOLDERS]
    assert cfg.model.test_cfg.crop_size[0] <= tools['make_data'].DEFAULTS['pair_size']
