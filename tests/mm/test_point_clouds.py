"""Data sets of clouds, what is refused and how, metrics by their rules, and runs of the recipes."""

import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from vmamba_mm.errors import UserError
from vmamba_mm.heads import PointHead, PointPreprocessor
from vmamba_mm.mm.labels import check_num_classes
from vmamba_mm.mm.points.dataset import draw_task
from vmamba_mm.registry import DATASETS

CLASSES = 'airplane', 'night_stand', 'table'
RNG = np.random.default_rng(0)


def dataset(kind, root, pipeline=(), **kwargs):
    return DATASETS.build(dict(type=f'vmamba_mm.{kind}', data_root=str(root),
                               pipeline=list(pipeline), **kwargs))


def step(kind, **kwargs):
    from vmamba_mm.registry import TRANSFORMS

    return TRANSFORMS.build(dict(type=f'vmamba_mm.{kind}', **kwargs))


def metric(kind, **kwargs):
    from vmamba_mm.registry import METRICS

    return METRICS.build(dict(type=f'vmamba_mm.{kind}', **kwargs))


def shape_of(label, count=80):
    """Points of a class: a flat, a long or a round cloud."""
    scale = np.full(3, 0.1)
    scale[:label + 1] = 1
    return (RNG.normal(size=(count, 3)) * scale).astype(np.float32)


def write_text(path, table, end=','):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, table, fmt='%.6f', delimiter=end)


def write_modelnet(root, clouds=4, count=80):
    root.mkdir(parents=True, exist_ok=True)
    (root / 'modelnet40_shape_names.txt').write_text('\n'.join(CLASSES))
    for split in ('train', 'test'):
        names = [f'{name}_{i:04}' for i in range(clouds) for name in CLASSES]
        (root / f'modelnet40_{split}.txt').write_text('\n'.join(names) + '\n')
        for name in names:
            kind = name.rpartition('_')[0]
            points = shape_of(CLASSES.index(kind), count)
            write_text(root / kind / f'{name}.txt', np.concatenate([points, points], 1))


def write_scans(root, count=90):
    h5py = pytest.importorskip('h5py', reason="h5py is not installed (extra 'points')")
    for folder, end in (('main_split', ''), ('main_split_nobg', ''),
                        ('main_split', '_augmentedrot_scale75')):
        for split in ('training', 'test'):
            path = root / folder / f'{split}_objectdataset{end}.h5'
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, 'w') as file:
                file['data'] = np.stack([shape_of(i % 3, count) for i in range(8)])
                file['label'] = np.arange(8) % 3


def write_parts(root, count=70):
    folders = {'Airplane': '02691156', 'Bag': '02773838'}
    root.mkdir(parents=True, exist_ok=True)
    (root / 'synsetoffset2category.txt').write_text(
        ''.join(f'{name}\t{folder}\n' for name, folder in folders.items()))
    lists = root / 'train_test_split'
    lists.mkdir()
    for split in ('train', 'val', 'test'):
        names = []
        for number, folder in enumerate(folders.values()):
            for i in range(2):
                names.append(f'shape_data/{folder}/{split}{i}')
                points = shape_of(number, count)
                part = (points[:, :1] > 0) + 4 * number
                write_text(root / folder / f'{split}{i}.txt',
                           np.concatenate([points, points, part], 1), ' ')
        (lists / f'shuffled_{split}_file_list.json').write_text(json.dumps(names))


def write_shapenet(root, count=120):
    for folder in ('ShapeNet-55', 'shapenet_pc'):
        (root / folder).mkdir(parents=True)
    for split in ('train', 'test'):
        names = [f'02691156-{split}{i}.npy' for i in range(4)]
        (root / 'ShapeNet-55' / f'{split}.txt').write_text('\n'.join(names))
        for i, name in enumerate(names):
            np.save(root / 'shapenet_pc' / name, shape_of(i % 3, count))


def write_few_shot(root, way=5, shot=10, count=80):
    folder = root / f'{way}way_{shot}shot'
    folder.mkdir(parents=True)
    task = {split: [(np.concatenate([shape_of(i % 3, count)] * 2, 1), i, 7 * i)
                    for i in range(way) for _ in range(2)] for split in ('train', 'test')}
    (folder / '0.pkl').write_bytes(pickle.dumps(task))


# --- data sets ----------------------------------------------------------------------------------

def test_modelnet(tmp_path):
    write_modelnet(tmp_path)
    pipeline = [dict(type='vmamba_mm.LoadPoints'), dict(type='vmamba_mm.NormalizePoints'),
                dict(type='vmamba_mm.PackPoints')]
    data = dataset('ModelNet40', tmp_path, pipeline, split='test')
    assert len(data) == 12
    item = data[4]
    assert item['inputs'].shape == (80, 3) and item['data_samples'].gt_label.tolist() == [1]
    assert item['data_samples'].path.endswith('night_stand_0001.txt')
    torch.testing.assert_close(item['inputs'].norm(dim=1).max(), torch.tensor(1.0))
    torch.testing.assert_close(item['inputs'].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    # What the public code makes of it is taken where it is there.
    clouds = [np.full((9, 6), i, np.float32) for i in range(2)]
    labels = [np.array([2], np.int32), np.array([0], np.int32)]
    (tmp_path / 'modelnet40_test_8192pts_fps.dat').write_bytes(pickle.dumps([clouds, labels]))
    packed = dataset('ModelNet40', tmp_path, pipeline[:1], split='test')
    assert [packed[i]['gt_label'] for i in range(2)] == [2, 0]
    assert packed[1]['points'].tolist() == [[1.0] * 3] * 9


def test_scans(tmp_path):
    write_scans(tmp_path)
    for variant in ('obj_bg', 'obj_only', 'pb_t50_rs'):
        scans = dataset('ScanObjectNN', tmp_path, [dict(type='vmamba_mm.LoadPoints')],
                        variant=variant)
        assert len(scans) == 8 and [scans[i]['gt_label'] for i in range(4)] == [0, 1, 2, 0]
        assert scans[0]['points'].shape == (90, 3)
        folder, end = {'obj_bg': ('main_split', ''), 'obj_only': ('main_split_nobg', ''),
                       'pb_t50_rs': ('main_split', '_augmentedrot_scale75')}[variant]
        assert scans[0]['path'] == str(
            tmp_path / folder / f'training_objectdataset{end}.h5') + ', number 0'


def test_other_data_sets(tmp_path):
    write_parts(tmp_path / 'parts')
    write_shapenet(tmp_path / 'shapenet')
    write_few_shot(tmp_path / 'few')
    load = [dict(type='vmamba_mm.LoadPoints')]
    few = dataset('ModelNetFewShot', tmp_path / 'few', load, way=5, shot=10, fold=0)
    assert [few[i]['gt_label'] for i in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert few[0]['points'].shape == (80, 3)
    assert len(dataset('ShapeNet55', tmp_path / 'shapenet', load)) == 4
    load = [dict(type='vmamba_mm.LoadPoints', part_column=6)]
    parts = [len(dataset('ShapeNetPart', tmp_path / 'parts', load, split=split))
             for split in ('train', 'val', 'trainval', 'test')]
    assert parts == [4, 4, 8, 4]
    items = list(dataset('ShapeNetPart', tmp_path / 'parts', load, split='test'))
    assert [item['category'] for item in items] == [0, 0, 1, 1]
    assert set(items[0]['gt_parts']) == {0, 1} and set(items[3]['gt_parts']) == {4, 5}
    few_parts = [dict(type='vmamba_mm.LoadPoints', part_column=6, num_parts=5)]
    with pytest.raises(UserError, match='has the part 5 in column 6, and parts are .* from 0 to 4'):
        list(dataset('ShapeNetPart', tmp_path / 'parts', few_parts, split='test'))
    for kind, kwargs, message in (
            ('ShapeNet55', dict(split='val'), "split='val'.*'train', 'test'"),
            ('ScanObjectNN', dict(variant='easy'), "variant='easy'.*'obj_bg'")):
        with pytest.raises(ValueError, match=message):
            dataset(kind, tmp_path, **kwargs)


def test_what_is_missing_or_broken_is_one_line(tmp_path):
    write_parts(tmp_path / 'parts')
    write_few_shot(tmp_path / 'few')
    (tmp_path / 'few/5way_10shot/1.pkl').write_bytes(pickle.dumps(print))
    (tmp_path / 'few/5way_10shot/2.pkl').write_bytes(b'')
    (tmp_path / 'few/5way_10shot/3.pkl').write_bytes(pickle.dumps([1]))
    (tmp_path / 'few/5way_10shot/4.pkl').write_bytes(pickle.dumps(dict(train=[1, 2])))
    write_modelnet(tmp_path / 'packed', clouds=1)
    (tmp_path / 'packed/modelnet40_train_8192pts_fps.dat').write_bytes(
        pickle.dumps([[np.zeros((9, 6))], []]))
    write_modelnet(tmp_path / 'net')
    (tmp_path / 'net/modelnet40_train.txt').write_text('sofa_0001')
    (tmp_path / 'net/modelnet40_test.txt').write_text('')
    (tmp_path / 'parts/train_test_split/shuffled_test_file_list.json').write_text('["a/1/b"]')
    (tmp_path / 'parts/train_test_split/shuffled_val_file_list.json').write_text('[')
    (tmp_path / 'parts/train_test_split/shuffled_train_file_list.json').write_text('["b"]')
    task = dict(way=5, shot=10)
    cases = [
        ('ModelNet40', 'nowhere', {}, 'modelnet40_shape_names.txt cannot be read .*data_root='),
        ('ModelNet40', 'net', {}, 'sofa_0001 in modelnet40_train.txt is of no class'),
        ('ModelNet40', 'net', dict(split='test'), 'modelnet40_test.txt is empty'),
        ('ModelNet40', 'packed', {}, 'fps.dat has 1 clouds and 0 labels: fetch the file anew'),
        ('ScanObjectNN', 'nowhere', dict(variant='obj_bg'), 'training_objectdataset.h5 does not'),
        ('ShapeNetPart', 'parts', dict(split='test'), 'a/1/b in .* is of no category'),
        ('ShapeNetPart', 'parts', dict(split='train'), 'b in .* is of no category'),
        ('ShapeNetPart', 'parts', dict(split='val'), 'cannot be read as a list of files'),
        ('ModelNetFewShot', 'few', dict(task, fold=9), '9.pkl cannot be read .*data_root='),
        ('ModelNetFewShot', 'few', dict(task, fold=1), '1.pkl is not safe to load: it holds '
                                                       'builtins.print, which could run code'),
        ('ModelNetFewShot', 'few', dict(task, fold=2), '2.pkl is no pickled file of clouds'),
        ('ModelNetFewShot', 'few', dict(task, fold=3), '3.pkl holds a list, not clouds'),
        ('ModelNetFewShot', 'few', dict(task, fold=4), "4.pkl has a list 'train' that is not of")]
    for kind, root, kwargs, message in cases:
        with pytest.raises(UserError, match=message) as error:
            dataset(kind, tmp_path / root, **kwargs)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, message', [
    ('', 'is empty'), ('1 2 x\n', 'is no table of numbers'), ('1 2 3\n4 5\n', 'is no table'),
    ('1 2\n3 4\n', r'has the shape \(2, 2\), and a point in each row with 3 columns'),
    ('1 2 3\n1 nan 3\n', 'has a point that is NaN or infinite, number 1: remove it')])
def test_bad_files_name_themselves(tmp_path, text, message):
    path = tmp_path / 'cloud.txt'
    path.write_text(text)
    with pytest.raises(UserError, match=f'cloud.txt {message}'):
        step('LoadPoints')(dict(path=str(path)))
    with pytest.raises(UserError, match='nothing.txt cannot be read'):
        step('LoadPoints')(dict(path=str(tmp_path / 'nothing.txt')))
    with pytest.raises(UserError, match='x.npy is no table'):
        (tmp_path / 'x.npy').write_text('no')
        step('LoadPoints')(dict(path=str(tmp_path / 'x.npy')))


@pytest.mark.parametrize('name', ['a.npy', 'B.NPY', 'c.csv', 'd.XYZ'])
def test_kinds_of_files(name, tmp_path):
    points, path = np.arange(12, dtype=np.float32).reshape(3, 4), tmp_path / name
    with open(path, 'wb') as file:
        if 'np' in name.lower():
            np.save(file, points)
        else:
            np.savetxt(file, points, delimiter=',' if 'csv' in name else ' ')
    assert (step('LoadPoints')(dict(path=str(path)))['points'] == points[:, :3]).all()


def test_steps():
    points = np.arange(30, dtype=np.float32).reshape(10, 3)
    sample = dict(points=points, gt_parts=np.arange(10))
    np.random.seed(0)
    mixed = step('SamplePoints')(dict(sample))
    assert sorted(mixed['gt_parts']) == list(range(10)) != mixed['gt_parts'].tolist()
    assert (mixed['points'][:, 0] == 3 * mixed['gt_parts']).all()
    first = step('SamplePoints', num=4, first=True)(dict(sample))
    assert first['gt_parts'].tolist() == [0, 1, 2, 3]
    assert len(step('SamplePoints', num=25, replace=True)(dict(sample))['points']) == 25
    with pytest.raises(UserError, match='has 10 points, and 25 are to be taken'):
        step('SamplePoints', num=25)(dict(sample))
    same = step('NormalizePoints')(dict(points=np.ones((5, 3), np.float32)))['points']
    assert (same == 0).all()
    with pytest.raises(UserError, match='has neither points nor the path'):
        step('LoadPoints')(dict(img_path='a.png'))
    with pytest.raises(UserError, match='the cloud has no points'):
        step('LoadPoints')(dict(points=np.zeros((0, 3))))


def test_names_of_classes(tmp_path):
    write_modelnet(tmp_path / 'net')
    write_few_shot(tmp_path / 'few')
    load = [dict(type='vmamba_mm.LoadPoints')]
    assert dataset('ModelNet40', tmp_path / 'net', load).metainfo['classes'] == CLASSES
    own = dataset('ModelNet40', tmp_path / 'net', load, metainfo=dict(classes=('a', 'b', 'c')))
    assert own.metainfo['classes'] == ('a', 'b', 'c')
    few = dataset('ModelNetFewShot', tmp_path / 'few', load, way=5, shot=10, fold=0)
    assert few.metainfo['classes'] == ('airplane', 'car', 'dresser', 'mantel', 'range_hood')
    kinds = {name: DATASETS.get(f'vmamba_mm.{name}').METAINFO['classes']
             for name in ('ModelNet40', 'ScanObjectNN')}
    assert [len(set(classes)) for classes in kinds.values()] == [40, 15]
    assert list(kinds['ModelNet40']) == sorted(kinds['ModelNet40'])


def test_a_head_of_too_few_classes_is_refused(tmp_path):
    write_modelnet(tmp_path)
    data = dataset('ModelNet40', tmp_path)
    model = SimpleNamespace(head=PointHead(4, num_classes=2))
    with pytest.raises(UserError, match='num_classes is 2, and train_dataloader has 3 classes'):
        check_num_classes(model, data, 'train_dataloader', print)


def test_clouds_of_a_batch_are_named():
    prepare = PointPreprocessor(num_points=6)
    samples = [BaseDataElement(metainfo=dict(path=f'{name}.txt')) for name in 'ab']
    clouds = torch.randn(2, 8, 3)
    clouds[1, 2] = torch.nan
    with pytest.raises(UserError, match='b.txt has points that are NaN or infinite'):
        prepare(dict(inputs=clouds, data_samples=samples))
    with pytest.raises(UserError, match='a.txt has 5 points, and 6 are to be sampled: leave it'):
        prepare(dict(inputs=clouds[:, 3:], data_samples=samples))
    with pytest.raises(UserError, match='a cloud has 5 points'):
        prepare(dict(inputs=clouds[:, 3:]))


def test_few_shot_tasks_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    labels = {split: rng.integers(0, 12, 600).tolist() for split in ('train', 'test')}
    tasks = [draw_task(labels, 5, 10, fold) for fold in range(10)]
    assert len({tuple(classes) for classes, _ in tasks}) == 10
    classes, numbers = tasks[3]
    assert tasks[3] == draw_task(labels, 5, 10, 3)
    for split, count in (('train', 10), ('test', 20)):
        chosen = numbers[split]
        assert len(set(chosen)) == len(chosen) == 5 * count
        assert sorted(labels[split][i] for i in chosen) == sorted(classes * count)
    # The numbers of this version, which no other may change.
    few = {split: [i % 3 for i in range(90)] for split in ('train', 'test')}
    assert draw_task(few, 2, 3, 0, count=1) == (
        [2, 0], dict(train=[77, 23, 72, 18, 47, 69], test=[48, 71]))
    for way, shot, message in ((13, 5, '12 classes, and way=13'), (5, 99, '99 are to be drawn')):
        with pytest.raises(ValueError, match=message):
            draw_task(labels, way, shot, 0)

    write_modelnet(tmp_path, clouds=21, count=12)
    load = [dict(type='vmamba_mm.LoadPoints')]
    task = dict(way=2, shot=5, fold=1, draw=True)
    train, test = (dataset('ModelNetFewShot', tmp_path, load, split=split, **task)
                   for split in ('train', 'test'))
    assert (len(train), len(test)) == (10, 40) and len(train.metainfo['classes']) == 2
    assert train.metainfo['classes'] == test.metainfo['classes']
    for data in (train, test):
        for i in range(len(data)):
            info = data.get_data_info(i)
            assert data.metainfo['classes'][info['gt_label']] in info['path']
    with pytest.raises(UserError, match='class . has 21 clouds in .train., and 22 are to be'):
        dataset('ModelNetFewShot', tmp_path, load, **dict(task, shot=22))


# --- metrics --------------------------------------------------------------------------------------

def test_accuracy():
    found = metric('PointAccuracy')
    pairs = [(0, 0), (0, 0), (0, 1), (0, 0), (1, 1), (1, 0)]
    found.process(None, [dict(gt_label=torch.tensor([a]), pred_label=torch.tensor([b]))
                         for a, b in pairs])
    assert found.evaluate(6) == pytest.approx(
        dict(accuracy=100 * 4 / 6, class_accuracy=100 * (3 / 4 + 1 / 2) / 2))


def test_iou_of_parts_by_its_own_rule():
    """Two categories, of two and three parts."""
    found = metric('PartIoU', parts=dict(Bag=2, Lamp=3))
    scores = torch.zeros(4, 5)
    scores[:, 3] = 9.0  # of another category: does not count for a bag
    scores[[0, 1, 2, 3], [0, 0, 1, 1]] = 1.0
    bag = dict(category=torch.tensor([0]), gt_parts=torch.tensor([0, 1, 1, 1]), pred_scores=scores)
    lamp_scores = torch.zeros(4, 5)
    lamp_scores[:, 2] = 1.0
    lamp = dict(category=torch.tensor([1]), gt_parts=torch.full((4,), 2), pred_scores=lamp_scores)
    found.process(None, [bag, lamp, lamp])
    result = found.evaluate(3)
    of_bag = (1 / 2 + 2 / 3) / 2
    of_lamp = 1.0  # two of its parts are neither there nor predicted
    assert result == pytest.approx(dict(
        instance_miou=100 * (of_bag + 2 * of_lamp) / 3, class_miou=100 * (of_bag + of_lamp) / 2,
        accuracy=100 * 11 / 12, iou_Bag=100 * of_bag, iou_Lamp=100 * of_lamp))


def test_distance_of_rebuilt_points():
    found, points = metric('RebuiltDistance'), torch.randn(6, 3)
    found.process(None, [dict(pred_points=points + 0.001, masked_points=points)])
    result = found.evaluate(1)
    assert result['cdl2'] == pytest.approx(6e-3, rel=1e-3)
    assert result['cdl1'] == pytest.approx(3 ** 0.5, rel=1e-3)


# --- recipes --------------------------------------------------------------------------------------

def small(cfg, root, folder, **arch):
    """The recipe on few points, with a small model, for two epochs."""
    arch = dict(embed_dims=12, depth=3, num_groups=16, group_size=8, d_state=2, **arch)
    model = cfg.model
    arch['order'] = model.backbone.arch.partition('_')[0]
    model.backbone.update(arch=arch, init_cfg=None)
    preprocessor = model.data_preprocessor
    if preprocessor.get('num_points'):
        preprocessor.update(num_points=32, pool=48)
    if 'head' in model:
        model.head.in_channels = 12
    if 'decode_head' in model:
        model.backbone.out_indices = (0, 2)
        model.decode_head.in_channels = [12, 12]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(root)
        for transform in loader.dataset.pipeline:
            if transform.get('num'):
                transform.num = 40
    cfg.train_cfg.update(max_epochs=2, val_interval=1)
    cfg.work_dir = str(folder)
    cfg.default_hooks.logger.interval = 1
    return cfg


WRITERS = {'modelnet40': write_modelnet, 'scanobjectnn': write_scans, 'shapenetpart': write_parts,
           'shapenet55': write_shapenet, '5way': write_few_shot}
RUNS = ['pointmamba_1xb32-300e_modelnet40', 'pointmamba_1xb32-300e_scanobjectnn-obj-only',
        'pointmamba-axes_1xb32-300e_scanobjectnn-pb-t50-rs',
        'pointmamba-axes-scratch_1xb16-300e_shapenetpart', 'pointmamba_1xb128-300e_shapenet55',
        'pointmamba-axes_1xb128-300e_shapenet55',
        'few_shot/pointmamba_1xb32-150e_modelnet40-5way-10shot']


@pytest.mark.parametrize('name', RUNS)
def test_recipes_train_and_evaluate(name, tmp_path, read_config, mm):
    from mmengine.runner import Runner

    write = next(w for key, w in reversed(WRITERS.items()) if key in name)
    write(tmp_path / 'data')
    cfg = small(copy.deepcopy(read_config(f'configs/pointmamba/{name}.py')), tmp_path / 'data',
                tmp_path / 'run')
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    before = {k: p.detach().clone() for k, p in runner.model.named_parameters()}
    runner.train()
    # Before a batch norm a bias has no effect, and the rate of the first epoch is small.
    still = {k for k, p in runner.model.named_parameters() if torch.equal(p, before[k])}
    assert all(k.endswith('bias') for k in still), still
    results = runner.test()
    wanted = {'shapenetpart': 'instance_miou', 'shapenet55': 'cdl2'}
    key = next((m for k, m in wanted.items() if k in name), 'accuracy')
    assert 0 <= results[key] < 1e6 and np.isfinite(results[key])
    if key == 'accuracy':
        model = runner.model
        model.data_preprocessor.votes = 3
        assert 0 <= runner.test()['accuracy'] <= 100


def test_models_without_samples():
    """What is predicted alone, such as from a script."""
    from vmamba_mm.heads import PointClassifier, PointHead
    from vmamba_mm.models import PointMamba

    arch = dict(embed_dims=8, depth=1, num_groups=6, group_size=4, order='hilbert')
    model = PointClassifier(PointMamba(arch, out_type='raw'), PointHead(8, 3)).eval()
    data = model.data_preprocessor(dict(inputs=[torch.randn(30, 3)]))
    sample, = model(**data, mode='predict')
    assert isinstance(sample, BaseDataElement) and sample.pred_score.shape == (3,)
    assert model.get_layer_depth('head.fc.bias') == (2, 3)
