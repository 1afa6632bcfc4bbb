"""The demo of points: solids of their classes, the same clouds each time, an outline that tells
little."""

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

CONFIG = CONFIGS / 'demo' / 'pointmamba_shapes-256.py'
TOOLS = 'make_data', 'shapes', 'points', 'report', 'run', 'screen'


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield {name: load(f'demo/{name}.py') for name in TOOLS}


@pytest.fixture(scope='module')
def settings(tools):
    return {**tools['make_data'].DEFAULTS, 'shapes_per_class': (20, 10)}


@pytest.fixture(scope='module')
def root(tools, settings, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    tools['make_data'].build(path, settings, ['shapes'])
    return path / 'shapes'


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*.txt'))}


def test_the_same_clouds_each_time(root, tools, settings, tmp_path):
    tools['make_data'].build(tmp_path, settings, ['shapes'])
    assert content(tmp_path / 'shapes') == content(root)
    assert len(content(root)) == 3 + 8 * (20 + 10)


def test_points_lie_on_their_solids(tools):
    """Before noise, cut and turn."""
    shapes, rng = tools['shapes'], np.random.default_rng(0)
    for _ in range(5):
        for name in shapes.CLASSES:
            vertices, faces = mesh = shapes.make_mesh(rng, name)
            points = shapes.sample_surface(rng, mesh, 500)
            assert (points >= vertices.min(0) - 1e-9).all()
            assert (points <= vertices.max(0) + 1e-9).all()
            from_above = np.hypot(points[:, 0], points[:, 2])
            top = vertices[:, 1].max()
            if name == 'cylinder':
                assert ((from_above > 0.99) | (points[:, 1] == 0) | (points[:, 1] == top)).all()
            if name == 'cone':
                side = points[:, 1] > 0
                assert np.allclose(from_above[side], 1 - points[side, 1] / top, atol=0.01)
            if name == 'torus':
                across = np.hypot(from_above - 1, points[:, 1])
                assert np.allclose(across, vertices[:, 1].max(), atol=0.03)
            if name in ('box', 'ellipsoid'):
                around = np.abs(points) / (np.ptp(vertices, 0) / 2)
                reach = around.max(1) if name == 'box' else np.linalg.norm(around, axis=1)
                assert np.allclose(reach, 1, atol=0.03)
    # As many points for each unit of the surface: of a flat box nearly all on its two large sides.
    flat = shapes.sample_surface(rng, shapes.block((1, 1e-3, 1)), 4000)
    assert abs((flat[:, 1] > 0).mean() - 0.5) < 0.05
    assert abs(np.histogram(flat[:, 0], 4, (-0.5, 0.5))[0] / 1000 - 1).max() < 0.1


def test_a_wrong_label_is_found(tools, settings, tmp_path):
    tools['make_data'].build(tmp_path, settings, ['shapes'])
    path = tmp_path / 'shapes/modelnet40_test.txt'
    path.write_text(path.read_text().replace('cone_test0003', 'box_test0003'))
    with pytest.raises(SystemExit, match='test: labels'):
        tools['shapes'].verify(tmp_path / 'shapes', settings, tools['make_data'].check)


def test_the_outline_alone_tells_little(root, tools):
    """More than chance, and less than the floor of the demo."""
    demo = tools['points']
    assert 2 * 100 / 8 < demo.accuracy_of_outlines(root) < demo.FLOOR - demo.MARGIN
    known = np.array([[0.0, 0], [0, 1], [9, 0], [9, 1]])
    found = demo.vote_of_neighbours(known, np.array([3, 3, 5, 5]), known + 0.1, count=1)
    assert found.tolist() == [3, 3, 5, 5]


def test_a_cloud_is_drawn_whole(tools, root):
    demo, shapes = tools['points'], tools['shapes']
    names, labels = shapes.list_clouds(root, 'test')
    assert labels.tolist() == sorted(labels.tolist()) and len(names) == 80
    cloud = shapes.read_cloud(root, names[0])
    place, near = demo.seen(cloud)
    assert place.min() > 0 and place.max() < demo.SIDE and len(near) == len(cloud)
    page = np.asarray(demo.draw_cloud(cloud, 'box', 'black'))
    assert (page[:demo.SIDE] < 255).any(-1).mean() > 0.03
    order = demo.draw_order(cloud, cloud[:9], np.arange(9)[::-1], 'order')
    assert order.size == (demo.SIDE, demo.SIDE + 30)
    assert demo.blend(0) == (68, 1, 84) and demo.blend(1) == (253, 231, 37)


@pytest.mark.parametrize('score, ends', [(97.0, None), (60.0, 'accuracy below 85 %')])
def test_the_demo_from_end_to_end(tools, settings, score, ends, tmp_path, monkeypatch, capsys):
    """With tools that are made up, and the model as it is at first."""
    from PIL import Image

    work_dir, done = tmp_path / 'work', []

    def run(name, log, *command):
        done.append(name)
        if name == 'train':
            work_dir.mkdir()
            (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_9.pth\n')
        else:
            (work_dir / 'metrics.json').write_text(f'{{"accuracy": {score}}}')
        return 1.0

    def load_model(checkpoint):
        assert checkpoint == work_dir / 'epoch_9.pth'
        return cli.build_model(cli.load_config(str(CONFIG))).eval()

    monkeypatch.setattr(tools['run'], 'run', run)
    monkeypatch.setattr(tools['points'], 'load_model', load_model)
    monkeypatch.setattr(tools['run'], 'ROOT', tmp_path)
    monkeypatch.setattr(tools['make_data'], 'DEFAULTS', settings)
    monkeypatch.setattr(sys, 'argv', ['points.py', '--work-dir', str(work_dir)])
    monkeypatch.chdir(tmp_path)  # main() goes to ROOT
    with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
        tools['points'].main()
    assert done == ['train', 'evaluate']
    said = capsys.readouterr().out
    assert f'accuracy {score} % of 80 held-out clouds (floor 85 %, chance 12.5 %)' in said
    assert 'points above' in said and f'everything on one page: {work_dir}/report.png' in said
    assert len(list((work_dir / 'predictions').iterdir())) == 12 + 4
    with Image.open(work_dir / 'report.png') as page:
        assert page.height > 4 * tools['points'].SIDE


def test_a_tiny_run(root, call, tmp_path):
    """Train and evaluate, on the tiny set."""
    options = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=8',
               *(f'{name}_dataloader.dataset.{setting}' for name in ('train', 'val', 'test')
                 for setting in (f'data_root={root}', 'indices=16'))]
    code, out, err = call('train.py', CONFIG, '--work-dir', 'run', *options)
    assert code == 0, err[-2000:]
    code, out, err = call('test.py', CONFIG, 'run/epoch_1.pth', '--work-dir', 'test', *options)
    assert code == 0 and 'accuracy = ' in out, err[-2000:]


def test_config_fits_the_set(tools):
    cfg = cli.load_config(str(CONFIG))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == 'data/demo/shapes'
    assert cfg.model.head.num_classes == len(tools['shapes'].CLASSES)
    assert cfg.model.data_preprocessor.pool == tools['make_data'].DEFAULTS['shape_points']
