"""predict.py on clouds of points: classes, parts, several files, and files that are none."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

CLASSES = """
_base_ = [{base!r}]
model = dict(
    data_preprocessor=dict(num_points=64, pool=64),
    backbone=dict(arch=dict(_delete_=True, base='hilbert_g64', embed_dims=12, depth=1,
                            num_groups=8, group_size=4), init_cfg=None),
    head=dict(in_channels=12, num_classes=3))
"""
PARTS = """
_base_ = [{base!r}]
model = dict(
    backbone=dict(arch=dict(_delete_=True, base='axes_g128', embed_dims=12, depth=2, num_groups=8,
                            group_size=4), out_indices=(0, 1), init_cfg=None),
    decode_head=dict(in_channels=[12] * 2))
for pipeline in (_base_.pipeline,):
    pipeline[2].num = 64
del pipeline
test_dataloader = dict(dataset=dict(pipeline=_base_.pipeline))
"""
RNG = np.random.default_rng(0)


def write_project(folder, text, base, meta):
    """A config, and a checkpoint of random weights."""
    config = folder / 'config.py'
    config.write_text(text.format(base=str(CONFIGS / 'pointmamba' / base)))
    torch.manual_seed(0)
    model = cli.build_model(cli.load_config(str(config)))
    checkpoint = folder / 'model.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta)), checkpoint)
    return config, checkpoint


def write_clouds(folder, count=90):
    folder.mkdir()
    points = RNG.normal(size=(count, 3)).astype(np.float32)
    np.savetxt(folder / 'a.txt', points, delimiter=',')
    np.save(folder / 'b.npy', np.concatenate([points, points], 1))
    return points


@pytest.fixture
def classes(tmp_path):
    return write_project(tmp_path, CLASSES, 'pointmamba_1xb32-300e_modelnet40.py',
                         dict(classes=('cone', 'cup', 'tent')))


@pytest.fixture
def parts(tmp_path):
    return write_project(tmp_path, PARTS, 'pointmamba-axes_1xb16-300e_shapenetpart.py', {})


def test_classes(classes, call, tmp_path):
    write_clouds(tmp_path / 'clouds')
    code, out, err = call('predict.py', *classes, 'clouds')
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split(':')[0] for line in lines if line.startswith('[')] == [
        '[1/2] clouds/a.txt', '[2/2] clouds/b.npy']
    # The same points: the same classes.
    found = [line.split(': ')[1].split(' -> ')[0] for line in lines if line.startswith('[')]
    assert found[0] == found[1] and {w for w in found[0].split() if w.isalpha()} == {
        'cone', 'cup', 'tent'}
    image = np.asarray(Image.open(tmp_path / 'predictions/a.png').convert('RGB'))
    assert (image < 250).any(-1).mean() > 0.05
    # Names of other classes than the model's are left out.
    content = torch.load(classes[1], weights_only=False)
    torch.save(content | dict(meta={}), classes[1])
    code, out, err = call('predict.py', *classes, 'clouds/a.txt')
    assert code == 0 and 'class 0 ' in out and 'airplane' not in out, err


def test_parts(parts, call, tmp_path):
    points = write_clouds(tmp_path / 'clouds')
    (tmp_path / 'predictions').mkdir()
    (tmp_path / 'predictions/a.ply').write_text('somebody\'s own\n')
    args = 'predict.py', *parts, 'clouds', '--category', 'Chair'
    code, out, err = call(*args)
    assert code == 0, err
    assert '-> predictions/a_1.png' in out and '90 points, part 1' in out
    assert (tmp_path / 'predictions/a.ply').read_text() == 'somebody\'s own\n'
    lines = (tmp_path / 'predictions/a_1.ply').read_text().splitlines()
    assert lines[:2] == ['ply', 'format ascii 1.0'] and 'element vertex 90' in lines
    table = np.array([line.split() for line in lines[lines.index('end_header') + 1:]], float)
    assert table.shape == (90, 7)
    np.testing.assert_allclose(table[:, :3], points, rtol=1e-5, atol=1e-6)
    assert set(table[:, 6]) <= {12, 13, 14, 15}  # a chair's, after four other categories
    before = lines
    code, again, err = call(*args)  # the same names, and the same points are sampled
    assert code == 0 and again == out, err
    assert (tmp_path / 'predictions/a_1.ply').read_text().splitlines() == before


def test_what_a_model_of_parts_needs(parts):
    from vmamba_mm.errors import UserError
    from vmamba_mm.mm.points.predict import PartSegmentor

    cfg = cli.load_config(str(parts[0]))
    model = cli.build_model(cfg)
    for category, message in ((None, 'needs the category of the objects, one of Airplane, Bag'),
                              ('Sofa', "has no 'Sofa': the category .*Skateboard, Table")):
        with pytest.raises(UserError, match=f'^--category: a model of parts {message}'):
            PartSegmentor(model, cfg, {}, category)
    model.data_preprocessor.votes = 3
    with pytest.raises(UserError, match='needs model.data_preprocessor.votes=0'):
        PartSegmentor(model, cfg, {}, 'Chair')
    cfg.test_evaluator.parts = dict(A=3)
    with pytest.raises(UserError, match='16 categories and 50 parts, and the metric PartIoU 1 and'):
        PartSegmentor(model, cfg, {}, 'A')


def test_models_that_predict_no_files(classes, call, tmp_path):
    config = tmp_path / 'masked.py'
    base = str(CONFIGS / 'pointmamba/pointmamba_1xb128-300e_shapenet55.py')
    config.write_text(f'_base_ = [{base!r}]\n')
    assert_one_line(call('predict.py', config, classes[1], 'a.npy'),
                    'makes nothing of files by a MaskedPointMamba: load it in Python')


def test_options_of_other_models(classes, call, tmp_path):
    write_clouds(tmp_path / 'clouds')
    for option in (('--category', 'Chair'), ('--channels', '0')):
        assert_one_line(call('predict.py', *classes, 'clouds', *option), 'leave it out')


def test_bad_clouds_among_good_ones(classes, call, tmp_path):
    points, folder = write_clouds(tmp_path / 'clouds'), tmp_path / 'clouds'
    np.save(folder / 'nan.npy', np.where(np.arange(90)[:, None] == 7, np.nan, points))
    (folder / 'empty.txt').write_text('')
    (folder / 'empty.npy').write_bytes(b'')
    np.save(folder / 'none.npy', points[:0])
    np.save(folder / 'few.npy', points[:20])
    np.save(folder / 'flat.npy', points[:, :2])
    np.save(folder / 'words.npy', np.array([['a', 'b', 'c']]))
    (folder / 'ragged.txt').write_text('1 2 3\n1 2\n')
    (folder / 'words.txt').write_text('x y z\n1 2 3\n')
    (folder / 'bytes.txt').write_bytes(bytes(range(256)))
    np.save(folder / 'same.npy', np.zeros((70, 3)))  # no mistake: all points coincide
    result = code, out, err = call('predict.py', *classes, 'clouds')
    told = {name: line for line in err.splitlines() if line.startswith('skipped: ')
            for name in re.findall(r'^skipped: clouds/(\w+\.\w+)', line)}
    assert code == 1 and len(told) == 10 and '-> predictions/same.png' in out
    assert 'number 7' in told['nan.npy'] and 'no points' in told['none.npy']
    assert 'is empty' in told['empty.txt'] and 'no table of numbers' in told['empty.npy']
    assert '20 points, and 64 are to be sampled' in told['few.npy']
    assert '3 columns' in told['flat.npy'] and 'no table of numbers' in told['words.npy']
    assert 'line 2 has 2' in told['ragged.txt']
    assert 'no table of numbers' in told['words.txt'] and 'table' in told['bytes.txt']
    assert_one_line(result, '10 of 13 clouds could not be predicted')
    assert_one_line(call('predict.py', *classes, 'nowhere.txt'), 'the cloud nowhere.txt does not')


def test_tests_draw_nothing(classes, call, tmp_path):
    data = tmp_path / 'data/modelnet40_normal_resampled'
    data.mkdir(parents=True)
    (data / 'a.txt').write_text('')
    for option in (('--show-dir', 'drawn'), ('--out', 'a.pkl')):
        assert_one_line(call('test.py', *classes, *option), '--show-dir and --out',
                        'PointClassifier')
