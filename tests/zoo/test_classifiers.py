"""Classification with official files: convert, evaluate, predict, the mistakes."""

import json
import re

import pytest
import torch
from official import classifier_state, random_backbone, save_training_file
from zoo_helpers import (
    assert_scores,
    data_options,
    features,
    metainfo,
    metric,
    one_error,
    read_scores,
)

from vmamba_mm import zoo
from vmamba_mm.paths import CONFIGS

CONFIG = CONFIGS / 'vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py'


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['tiny_s1l8', 'tiny_s2l5', 'vanilla_tiny'])
def test_classifier_converts_and_evaluates(arch, samples, run, big, narrow):
    """Two of four labels are what the model says, so that the accuracy is 50 %."""
    root, rows = samples
    names = [name for name, _ in rows[::7]]
    config, settings = (CONFIG, arch) if arch == 'tiny_s1l8' else narrow('cls', arch)
    model = random_backbone(settings, (3,))
    state = classifier_state(model, generation=1 if 'vanilla' in arch else 2)
    head = [v for k, v in state.items() if 'head.' in k]
    logits = torch.nn.functional.linear(features(model, root, names), *head)
    expected = logits.softmax(1)
    labels = [*expected[:2].argmax(1).tolist(), *expected[2:].argmin(1).tolist()]
    ann_file = big / 'labels.txt'
    ann_file.write_text(''.join(f'{n} {i}\n' for n, i in zip(names, labels, strict=True)))

    file, converted = save_training_file(big / 'official.pth', state), big / 'ours.pth'
    out, _ = run('convert_checkpoint.py', file, converted)
    name = arch if settings == arch else 'VMamba of its own'
    assert f'{file}: {name}, task cls' in out

    def evaluate(checkpoint):
        scores = big / f'{checkpoint.stem}.pkl'
        out, _ = run('test.py', config, checkpoint, '--out', scores,
                     *data_options(root, ann_file))
        assert metric(out, 'accuracy/top1') == 50
        return read_scores(scores)

    found = evaluate(converted)
    assert_scores(found, expected)
    assert torch.equal(evaluate(file), found)


@pytest.fixture(scope='module')
def solved(samples, tmp_path_factory):
    """(official file, scores): its averaged weights know the photographs by heart.

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
        tmp_path_factory.mktemp('solved') / 'official.pth',
        state | {k: v.roll(1, 0) for k, v in head.items()}, model_ema=state | head)
    yield path, torch.nn.functional.linear(x, *head.values()).softmax(1)
    path.unlink()


@pytest.mark.slow
def test_imagenet_samples(solved, samples, sample_labels, run, tmp_path):
    """All of the ImageNet evaluation: preprocessing, class order, choice of weights."""
    file, expected = solved
    root, rows = samples
    scores = tmp_path / 'scores.pkl'
    out, _ = run('test.py', CONFIG, file, '--out', scores, *data_options(root, sample_labels))
    assert metric(out, 'accuracy/top1') == metric(out, 'accuracy/top5') == 100
    found = read_scores(scores)
    assert found.argmax(1).tolist() == [index for _, index in rows]
    assert_scores(found, expected)

    out, _ = run('test.py', CONFIG, file, '--weights', 'model',
                 *data_options(root, sample_labels), 'test_dataloader.dataset.indices=8')
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
    for name, index in (rows[3], rows[21]):
        out, _ = run('predict.py', CONFIG, solved[0], root / 'images' / name,
                     '--out-dir', tmp_path)
        line, = (line for line in out.splitlines() if line.startswith('[1/1]'))
        first = re.search(r'\.jpg: (.*?) [\d.]+ %', line)[1]
        assert first.lower().startswith(class_names[index].lower())


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
    out, err = run('test.py', CONFIG, tiny_file[0], *data_options(small_data),
                   fails=True)
    line = one_error(err)
    assert str(tiny_file[0]) in line and "'tiny_s2l5'" in line and "'tiny_s1l8'" in line
    assert f"use {zoo.config_for('vmamba', 'tiny_s2l5', 'cls')}" in line
    assert 'accuracy/top1 = ' not in out


@pytest.mark.slow
def test_classifier_given_to_a_detector(small_data, run, mm, narrow):
    pytest.importorskip('mmdet')
    config, arch = narrow('det', 'tiny_s2l5')
    file = save_training_file(small_data / 'a.pth', classifier_state(random_backbone(arch, (3,))))
    ann_file = small_data / 'a.json'
    classes = metainfo('det')['classes']
    ann_file.write_text(json.dumps(dict(
        images=[dict(id=0, file_name='a.png', width=200, height=30)], annotations=[],
        categories=[dict(id=i, name=name) for i, name in enumerate(classes)])))
    dataset = 'test_dataloader.dataset'
    _, err = run('test.py', config, file, '--cfg-options',
                 f'{dataset}.data_root={small_data}', f'{dataset}.ann_file=a.json',
                 f'{dataset}.data_prefix.img=images', f'test_evaluator.ann_file={ann_file}',
                 fails=True)
    assert 'it holds a classifier, and the model is a detector' in one_error(err)
