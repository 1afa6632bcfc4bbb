"""The zoo with official files of full size and random weights: load, convert, evaluate, infer.

The expected numbers come from the model whose weights were written to the file, before any name
was changed, and for classification from the authors' preprocessing with torchvision.
"""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from official import (
    SHARED,
    classifier_state,
    dense_state,
    random_backbone,
    save_hostile,
    save_training_file,
)

from vmamba_mm.checkpoints.compare import differences
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm
from vmamba_mm.families.vmamba import ARCH_SETTINGS

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / 'configs'
CLS = {arch: CONFIGS / f'vmamba/vmamba-{arch.replace("_", "-")}_8xb128_in1k-224.py'
       for arch in ARCH_SETTINGS}
DET = CONFIGS / 'vmamba/mask-rcnn_vmamba-tiny-s2l5_fpn_1x_coco.py'
SEG = CONFIGS / 'vmamba/upernet_vmamba-vanilla-tiny_8xb2-160k_ade20k-512x512.py'
ZOO = sorted((CONFIGS / 'vmamba').glob('*.py'))


@pytest.fixture
def run(call):
    """run(tool or script, ...) -> (stdout, stderr), on the CPU; ``fails`` tells the exit code."""

    def run(tool, *argv, fails=False):
        code, out, err = call(tool, *argv, env={'CUDA_VISIBLE_DEVICES': ''})
        assert (code != 0) == fails, f'{out[-2000:]}\n{err[-3000:]}'
        return out, err

    return run


@pytest.fixture
def big(tmp_path):
    """A folder for large files that pytest shall not keep."""
    yield tmp_path
    for path in tmp_path.rglob('*'):
        if path.is_file() and path.stat().st_size > 1 << 20:
            path.unlink()


def shared_data(name):
    root = SHARED / 'data' / name
    if not root.is_dir():
        pytest.skip(f'no real images at ../shared/data/{name} beside the checkout')
    return root


def metric(out, name):
    return float(re.search(rf'^{name} = (\S+)$', out, re.MULTILINE)[1])


def one_error(err):
    assert 'Traceback' not in err, err[-3000:]
    line, = (line for line in err.splitlines() if line.startswith('error: '))
    return line


# --- every row ------------------------------------------------------------------------------

def arch_of(config):
    """The architecture that the name of a config tells."""
    return re.search(r'vmamba-([a-z]+-[a-z0-9]+)_', config.name)[1].replace('-', '_')


@pytest.mark.parametrize('config', ZOO, ids=lambda p: p.stem)
def test_row_builds_and_takes_an_official_state_dict(config, read_config):
    from mmengine.registry import MODELS

    from vmamba_mm.models import VMamba

    cfg = read_config(config)
    arch, generation = arch_of(config), 1 if 'vanilla' in config.name else 2
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        if 'in1k' in config.name:
            state = classifier_state(VMamba(arch, out_indices=(3,)), 1000, generation)
        else:
            state = dense_state(VMamba(arch), generation)
            state |= {k: v for k, v in model.state_dict().items() if not k.startswith('backbone.')}
    found = to_mm(state)
    assert differences(model.state_dict(), found) == {}
    assert infer_arch(state) == arch
    assert infer_task(found) == {'vmamba': 'cls', 'mask': 'det', 'upernet': 'seg'}[
        re.match('[a-z]+', config.name)[0]]
    if 'in1k' not in config.name:
        model.load_state_dict(state)  # strict; the backbone takes the official names by itself


# --- classification -------------------------------------------------------------------------

def official_input(path):
    """The image as the authors' evaluation gives it to the model (1, 3, 224, 224)."""
    from PIL import Image
    from torchvision import transforms

    steps = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    return steps(Image.open(path).convert('RGB'))[None]


@pytest.fixture(scope='module')
def samples():
    """(folder, [(file name, class index)])."""
    root = shared_data('imagenet_samples')
    rows = [line.split() for line in (root / 'val.txt').read_text().splitlines()]
    return root, [(name, int(index)) for name, index in rows]


@torch.no_grad()
def features(model, root, names):
    """What the official classifier's head gets (B, C)."""
    images = torch.cat([official_input(root / 'images' / n) for n in names])
    return torch.cat([model(batch)[0].mean((2, 3)) for batch in images.split(25)])


def data_options(root, ann_file='val.txt'):
    dataset = 'test_dataloader.dataset'
    return ['--cfg-options', f'{dataset}.data_root={root}', f'{dataset}.ann_file={ann_file}',
            f'{dataset}.data_prefix=images', 'test_dataloader.num_workers=0',
            'test_dataloader.batch_size=25']


def read_scores(path):
    return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])


def assert_scores(found, expected):
    """Equal but for rounding: of other libraries for JPEG, or another number of threads."""
    error = (found.log() - expected.log()).abs().max().item()
    assert error < 1e-3, f'log probabilities differ by {error:.2g}'


FAMILIES = ('vanilla_tiny', 'tiny_s2l5', 'tiny_s1l8')


@pytest.mark.slow
@pytest.mark.parametrize('arch', [arch for arch in ARCH_SETTINGS if arch not in FAMILIES])
def test_classifier_converts(arch, run, big):
    """The larger ones: every weight arrives, by name; the tiny ones are evaluated too."""
    model = random_backbone(arch, (3,))
    state = classifier_state(model, generation=1 if 'vanilla' in arch else 2)
    file, converted = save_training_file(big / 'official.pth', state), big / 'ours.pth'
    out, _ = run('convert_checkpoint.py', file, converted)
    assert f'{file}: {arch}, task cls' in out
    found = torch.load(converted, weights_only=True)['state_dict']
    expected = {f'backbone.{name}': weight for name, weight in model.state_dict().items()}
    heads = [weight for name, weight in found.items() if name not in expected]
    for weight, official in zip(heads, (v for k, v in state.items() if 'head.' in k), strict=True):
        assert torch.equal(weight, official)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize('arch', FAMILIES)
def test_classifier_converts_and_evaluates(arch, samples, run, big):
    """Two of four labels are what the model says, so that the accuracy is 50 %."""
    root, rows = samples
    names = [name for name, _ in rows[::32]]
    model = random_backbone(arch, (3,))
    state = classifier_state(model, generation=1 if 'vanilla' in arch else 2)
    head = [v for k, v in state.items() if 'head.' in k]
    logits = torch.nn.functional.linear(features(model, root, names), *head)
    expected = logits.softmax(1)
    labels = [*expected[:2].argmax(1).tolist(), *expected[2:].argmin(1).tolist()]
    ann_file = big / 'labels.txt'
    ann_file.write_text(''.join(f'{n} {i}\n' for n, i in zip(names, labels, strict=True)))

    file, converted = save_training_file(big / 'official.pth', state), big / 'ours.pth'
    out, _ = run('convert_checkpoint.py', file, converted)
    assert f'{file}: {arch}, task cls' in out

    def evaluate(checkpoint):
        scores = big / f'{checkpoint.stem}.pkl'
        out, _ = run('test.py', CLS[arch], checkpoint, '--out', scores,
                     *data_options(root, ann_file))
        assert metric(out, 'accuracy/top1') == 50
        return read_scores(scores)

    found = evaluate(converted)
    assert_scores(found, expected)
    assert torch.equal(evaluate(file), found)


@pytest.fixture(scope='module')
def solved(samples, tmp_path_factory):
    """(official file, scores): its averaged weights know the 125 photographs by heart.

    Random features and a head solved by ridge regression for the classes in val.txt. The weights
    that are not averaged have the head's classes shifted by one.
    """
    root, rows = samples
    model = random_backbone('tiny_s1l8', (3,))
    x = features(model, root, [name for name, _ in rows])
    target = torch.nn.functional.one_hot(torch.tensor([i for _, i in rows]), 1000).double() * 12
    mean = x.mean(0).double()
    centred = x.double() - mean
    gram = centred @ centred.T + 0.1 * torch.eye(len(x))
    weight = torch.linalg.solve(gram, target - target.mean(0)).T @ centred
    bias = target.mean(0) - weight @ mean
    state = classifier_state(model)
    head = {'classifier.head.weight': weight.float(), 'classifier.head.bias': bias.float()}
    path = save_training_file(
        tmp_path_factory.mktemp('solved') / 'vssm1_tiny_0230s_ckpt_epoch_264.pth',
        state | {k: v.roll(1, 0) for k, v in head.items()}, model_ema=state | head)
    yield path, torch.nn.functional.linear(x, *head.values()).softmax(1)
    path.unlink()


@pytest.mark.slow
def test_imagenet_samples(solved, samples, run, tmp_path):
    """All of the ImageNet evaluation: preprocessing, class order, choice of weights."""
    file, expected = solved
    root, rows = samples
    scores = tmp_path / 'scores.pkl'
    out, _ = run('test.py', CLS['tiny_s1l8'], file, '--out', scores, *data_options(root))
    assert metric(out, 'accuracy/top1') == metric(out, 'accuracy/top5') == 100
    found = read_scores(scores)
    assert found.argmax(1).tolist() == [index for _, index in rows]
    assert_scores(found, expected)

    out, _ = run('test.py', CLS['tiny_s1l8'], file, '--weights', 'model', *data_options(root),
                 'test_dataloader.dataset.indices=8')
    assert metric(out, 'accuracy/top1') == 0


@pytest.fixture(scope='module')
def class_names(samples):
    """[name], in the order of ImageNet-1K."""
    rows = [r.split('\t') for r in (samples[0] / 'classes.tsv').read_text().splitlines()]
    assert [int(index) for index, *_ in rows] == list(range(1000))
    return [name.replace('_', ' ') for _, _, name in rows]


def test_class_order_of_the_data_set(class_names, mm):
    datasets = pytest.importorskip('mmpretrain.datasets')
    theirs = datasets.ImageNet.METAINFO['classes']

    def plain(name):
        return re.sub('[^a-z]', '', name.lower())

    assert len(theirs) == 1000
    for ours, synonyms in zip(class_names, theirs, strict=True):
        assert plain(ours) in map(plain, synonyms.split(','))


@pytest.mark.slow
def test_predicted_names(solved, samples, class_names, run, tmp_path):
    root, rows = samples
    for name, index in (rows[3], rows[101]):
        out, _ = run('predict.py', CLS['tiny_s1l8'], solved[0], root / 'images' / name,
                     '--out-dir', tmp_path)
        line, = (line for line in out.splitlines() if line.startswith('[1/1]'))
        first = re.search(r'\.jpg: (.*?) [\d.]+ %', line)[1]
        assert first.lower().startswith(class_names[index].lower())


# --- detection and segmentation -------------------------------------------------------------

def metainfo(task):
    from importlib import import_module

    module, name = {'det': ('mmdet', 'CocoDataset'), 'seg': ('mmseg', 'ADE20KDataset')}[task]
    return getattr(import_module(f'{module}.datasets'), name).METAINFO


class Dense:
    """A model of a dense config with random weights, and its official file."""

    def __init__(self, task, folder):
        from mmengine.config import Config
        from mmengine.logging import MessageHub
        from mmengine.registry import MODELS, init_default_scope

        self.task, self.config = task, {'det': DET, 'seg': SEG}[task]
        self.cfg = Config.fromfile(self.config)
        init_default_scope(self.cfg.default_scope)
        torch.manual_seed(0)
        self.cfg.model.backbone.init_cfg = None
        self.model = MODELS.build(self.cfg.model).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
            if task == 'seg':  # never a class that CamVid does not have
                self.model.decode_head.conv_seg.bias[:11] += 100
        others = {k: v for k, v in self.model.state_dict().items()
                  if not k.startswith('backbone.')}
        self.newest = dense_state(self.model.backbone) | others
        official = dense_state(self.model.backbone, 1 if task == 'seg' else 2) | others
        hub = MessageHub(f'test_zoo_runs {task}')
        hub.update_scalar('train/loss', 1.0)
        self.content = dict(meta=dict(epoch=12, dataset_meta=metainfo(task)), state_dict=official,
                            message_hub=hub.state_dict())
        self.file = folder / f'official_{task}.pth'
        torch.save(self.content, self.file)

    def predict(self, image, scale=None):
        """What the model that was written to the file says to an image file."""
        from mmengine.dataset import Compose, pseudo_collate
        from mmengine.registry import init_default_scope

        init_default_scope(self.cfg.default_scope)
        pipeline = [dict(step) for step in self.cfg.test_dataloader.dataset.pipeline
                    if step.type != 'LoadAnnotations']
        if scale:
            pipeline[1]['scale'] = scale
        data = Compose(pipeline)(dict(img_path=str(image), img_id=0))
        with torch.no_grad():
            return self.model.test_step(pseudo_collate([data]))[0]


@pytest.fixture(scope='module')
def dense(mm, tmp_path_factory):
    """dense(task) -> Dense, made when asked for."""
    made = {}

    def dense(task):
        pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
        if task not in made:
            made[task] = Dense(task, tmp_path_factory.mktemp(task))
        return made[task]

    yield dense
    for one in made.values():
        one.file.unlink()


def assert_detections(found, expected):
    """Of two runs with another number of threads: nearly equal scores may change places."""
    assert len(found['scores']) == len(expected.scores) > 20
    torch.testing.assert_close(torch.as_tensor(found['scores']), expected.scores, rtol=0,
                               atol=1e-4)
    near = torch.cdist(torch.as_tensor(found['bboxes']), expected.bboxes, p=torch.inf) < 0.5
    same = torch.as_tensor(found['labels'])[:, None] == expected.labels
    assert (near & same).any(1).float().mean() > 0.95


def round_trip(one, run, folder):
    """Convert the official file to ours, back, and again; returns ours."""
    ours, back, again = (folder / f'{name}.pth' for name in ('ours', 'back', 'again'))
    run('convert_checkpoint.py', one.file, ours)
    run('convert_checkpoint.py', ours, back, '--to', 'official')
    run('convert_checkpoint.py', back, again)
    for path, expected in ((ours, one.model.state_dict()), (back, one.newest),
                           (again, one.model.state_dict())):
        content = torch.load(path, weights_only=True)
        assert list(content) == ['meta', 'state_dict']
        assert content['meta']['dataset_meta'] == one.content['meta']['dataset_meta']
        found = content['state_dict']
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())
    return ours


@pytest.mark.slow
def test_mask_rcnn_converts_and_evaluates(dense, run, big):
    """Two photographs of fruits with COCO's 80 categories around theirs.

    The model's best box in each is added as an object, so that something is found.
    """
    root = shared_data('fruits_nuts')
    one = dense('det')
    ours = round_trip(one, run, big)

    classes = one.content['meta']['dataset_meta']['classes']
    assert len(classes) == 80
    data = json.loads((root / 'annotations/instances_val.json').read_text())
    data['images'] = data['images'][:2]
    ids = [image['id'] for image in data['images']]
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] in ids]
    for annotation in data['annotations']:
        name = ('apple', 'orange', 'banana')[annotation['category_id'] - 1]
        annotation['category_id'] = classes.index(name) + 1
    predictions = [one.predict(root / 'val' / image['file_name'], (400, 300)).pred_instances
                   for image in data['images']]
    for number, (i, expected) in enumerate(zip(ids, predictions, strict=True)):
        x, y, x2, y2 = expected.bboxes[0].tolist()
        data['annotations'].append(dict(
            id=10000 + number, image_id=i, category_id=expected.labels[0].item() + 1, iscrowd=0,
            bbox=[x, y, x2 - x, y2 - y], area=(x2 - x) * (y2 - y),
            segmentation=[[x, y, x2, y, x2, y2, x, y2]]))
    data['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
    ann_file = big / 'instances.json'
    ann_file.write_text(json.dumps(data))

    def evaluate(checkpoint):
        dataset, out = 'test_dataloader.dataset', big / f'{checkpoint.stem}.pkl'
        text, _ = run('test.py', DET, checkpoint, '--out', out, '--cfg-options',
                      f'{dataset}.data_root={root}', f'{dataset}.ann_file={ann_file}',
                      f'{dataset}.data_prefix.img=val', f'{dataset}.pipeline.1.scale=(400,300)',
                      f'test_evaluator.ann_file={ann_file}', 'test_dataloader.num_workers=0')
        metrics = [metric(text, f'coco/{kind}_mAP') for kind in ('bbox', 'segm')]
        return metrics, [sample['pred_instances'] for sample in pickle.loads(out.read_bytes())]

    metrics, found = evaluate(one.file)
    assert metrics[0] > 0.1
    assert len(found) == 2
    for instances, expected in zip(found, predictions, strict=True):
        assert_detections(instances, expected)
    assert expected.labels.unique().numel() > 3

    same_metrics, again = evaluate(ours)
    assert same_metrics == metrics
    for a, b in zip(found, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ('labels', 'scores', 'bboxes'))
        assert a['masks'] == b['masks']


@pytest.mark.slow
def test_upernet_converts_and_evaluates(dense, run, big):
    from PIL import Image

    root = shared_data('camvid')
    one = dense('seg')
    ours = round_trip(one, run, big)

    def evaluate(checkpoint, maps):
        dataset = 'test_dataloader.dataset'
        out, _ = run('test.py', SEG, checkpoint, '--out', maps, '--cfg-options',
                     f'{dataset}.data_root={root}', f'{dataset}.indices=2',
                     f'{dataset}.pipeline.1.scale=(256,192)', 'test_dataloader.num_workers=0')
        return [metric(out, name) for name in ('mIoU', 'mAcc', 'aAcc')]

    metrics = evaluate(one.file, big / 'maps')
    assert min(metrics) > 0
    assert metrics == evaluate(ours, big / 'maps2')
    paths = sorted((big / 'maps').iterdir())
    assert len(paths) == 2
    for path in paths:
        found = np.array(Image.open(path))
        assert np.array_equal(found, np.array(Image.open(big / 'maps2' / path.name)))
        image = root / 'images/validation' / f'{path.stem}.jpg'
        expected = one.predict(image, (256, 192)).pred_sem_seg.data[0].numpy()
        assert found.shape == expected.shape and len(np.unique(expected)) > 3
        assert (found - 1 == expected).mean() > 0.99  # 0 is 'unlabelled' in ADE20K's files


# --- inferencers ----------------------------------------------------------------------------

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
def strip(tmp_path):
    """An image whose shape keeps the full-size pipelines of the configs cheap."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((400, 20), Image.Resampling.BICUBIC).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


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
    assert_detections(infer('det', DET, one.file), one.predict(strip).pred_instances)


@pytest.mark.slow
def test_seg_inferencer(dense, infer, strip):
    one = dense('seg')
    found = infer('seg', SEG, one.file)
    expected = one.predict(strip).pred_sem_seg.data[0].numpy()
    assert found.shape == expected.shape and len(np.unique(expected)) > 3
    assert (found == expected).mean() > 0.99


@pytest.fixture(scope='module')
def tiny_file(tmp_path_factory):
    """(official file of tiny_s2l5, the backbone, the state dict)."""
    model = random_backbone('tiny_s2l5', (3,))
    state = classifier_state(model)
    path = save_training_file(tmp_path_factory.mktemp('tiny') / 'vssm_tiny.pth', state)
    yield path, model, state
    path.unlink()


@pytest.mark.slow
def test_cls_inferencer(tiny_file, infer, strip, mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    file, model, state = tiny_file
    found = infer('cls', CLS['tiny_s2l5'], file)
    x = official_input(strip)
    with torch.no_grad():
        pooled = model(x)[0].mean((2, 3))
        logits = torch.nn.functional.linear(pooled, state['classifier.head.weight'],
                                            state['classifier.head.bias'])
        ours = mmpretrain.get_model(str(CLS['tiny_s2l5']), pretrained=str(file))(x)
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert_scores(torch.as_tensor(found['pred_scores'])[None], logits.softmax(1))
    assert found['pred_label'] == logits.argmax().item()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_inferencers_refuse_hostile_files(task, infer, big):
    """mmengine's own loader would run them: they are refused though nothing was imported."""
    witness = big / 'ran'
    file = save_hostile(big / 'a.pth', {'a': torch.zeros(1)}, witness)
    err = infer(task, {'cls': CLS['tiny_s2l5'], 'det': DET, 'seg': SEG}[task], file, fails=True)
    assert 'UserError' in err and 'is not safe to load' in err
    assert not witness.exists()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_inferencers_refuse_another_variant(task, tiny_file, dense, infer):
    config, file, arch = {
        'cls': (CLS['tiny_s1l8'], tiny_file[0], 'tiny_s2l5'),
        'det': (CONFIGS / 'vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py', None, 'tiny_s2l5'),
        'seg': (CONFIGS / 'vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py', None,
                'vanilla_tiny')}[task]
    err = infer(task, config, file or dense(task).file, fails=True)
    assert f"it holds the arch '{arch}', and the model is 'tiny_s1l8'" in err


# --- mistakes, through the tool -------------------------------------------------------------

@pytest.fixture
def small_data(strip):
    """An ImageNet of one image; the mistakes are found before anything is evaluated."""
    (strip.parent / 'images').mkdir()
    strip.rename(strip.parent / 'images/a.png')
    (strip.parent / 'val.txt').write_text('a.png 0\n')
    return strip.parent


@pytest.mark.slow
def test_wrong_variant(tiny_file, small_data, run):
    out, err = run('test.py', CLS['tiny_s1l8'], tiny_file[0], *data_options(small_data),
                   fails=True)
    line = one_error(err)
    assert str(tiny_file[0]) in line and "'tiny_s2l5'" in line and "'tiny_s1l8'" in line
    assert 'use configs/vmamba/vmamba-tiny-s2l5_8xb128_in1k-224.py' in line
    assert (REPO / 'configs/vmamba/vmamba-tiny-s2l5_8xb128_in1k-224.py').is_file()
    assert 'accuracy/top1 = ' not in out


@pytest.mark.slow
def test_classifier_given_to_a_detector(tiny_file, small_data, run, mm):
    pytest.importorskip('mmdet')
    ann_file = small_data / 'a.json'
    classes = metainfo('det')['classes']
    ann_file.write_text(json.dumps(dict(
        images=[dict(id=0, file_name='a.png', width=200, height=30)], annotations=[],
        categories=[dict(id=i, name=name) for i, name in enumerate(classes)])))
    dataset = 'test_dataloader.dataset'
    _, err = run('test.py', DET, tiny_file[0], '--cfg-options', f'{dataset}.data_root={small_data}',
                 f'{dataset}.ann_file=a.json', f'{dataset}.data_prefix.img=images',
                 f'test_evaluator.ann_file={ann_file}', fails=True)
    assert 'it holds a classifier, and the model is a detector' in one_error(err)
