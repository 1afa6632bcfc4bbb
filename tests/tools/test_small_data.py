"""tools/analysis/small_data.py: what makes its comparison fair, its report, and runs of it."""

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.errors import UserError

TOOL = 'analysis/small_data.py'
SMALL = ['--size', 32, '--embed-dims', 12, '--depths', 1, 1, 1, 1, '--d-state', 8,
         '--batch-size', 8,
         '--device', 'cpu']


@pytest.fixture
def small_data(load_tool):
    """The script, and the modules beside it by the rest of their names."""
    main = load_tool('analysis/small_data.py')
    parts = {part: load_tool(f'analysis/small_data_{part}.py')
             for part in ('images', 'models', 'recipe', 'training', 'report')}
    return SimpleNamespace(main=main, **parts)


@pytest.fixture
def args(small_data):
    return argparse.Namespace(models=list(small_data.models.MODELS), seeds=[0, 1], size=32, lr=1e-3,
                              embed_dims=12, depths=[1, 1, 1, 1], conv_kernel=3, batch_size=8,
                              d_state=8, dtype='fp32', cuda_graphs=False)


@pytest.fixture
def data(tmp_path):
    tiny.make_cls(tmp_path / 'data', per_class=10)
    return tmp_path / 'data'


@pytest.fixture
def splits(small_data, data):
    return small_data.images.load(data, 32, torch.device('cpu'))[0]


# --- data -------------------------------------------------------------------------------------

def test_load(small_data, data):
    """Whole images, their classes in alphabetical order, at 8/7 of the size."""
    splits, classes = small_data.images.load(data, 32, torch.device('cpu'))
    assert classes == ['blue', 'red']
    for split in splits.values():
        assert split.images.shape == (20, 3, 37, 37) and split.images.dtype == torch.uint8
        assert split.labels.tolist() == [0] * 10 + [1] * 10
        red, _, blue = split.images.float().mean((2, 3)).unbind(1)
        assert torch.equal(red > blue, split.labels == 1)


def test_augment_crops_and_flips(small_data, monkeypatch):
    """Of ramps along both sides: areas, ratios and mirrors as asked for; no colour of its own."""
    side = 64
    ramp = torch.arange(side).float().mul(255 / side)
    image = torch.stack((ramp.expand(side, side), ramp.view(-1, 1).expand(side, side),
                         torch.full((side, side), 100.0))).round().byte()
    monkeypatch.setitem(small_data.recipe.RECIPE, 'colour', 0.0)
    x = small_data.recipe.augment(image.expand(400, 3, side, side), 32,
                                  torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in (small_data.recipe.MEAN, small_data.recipe.STD))
    x = x * std + mean
    assert x.shape == (400, 3, 32, 32)
    torch.testing.assert_close(x[:, 2], torch.full((400, 32, 32), 100.0))
    # The ramp's slope is the share of the side that the crop takes, from one border to the other.
    width = (x[:, 0, :, -2] - x[:, 0, :, 1]).mean(1) / 255 * 32 / 29
    height = (x[:, 1, -2] - x[:, 1, 1]).mean(1) / 255 * 32 / 29
    flipped = (width < 0).float().mean()
    assert 0.4 < flipped < 0.6 and (height > 0).all()
    area, ratio = width.abs() * height, width.abs() / height
    assert 0.2 < area.min() < 0.3 and 0.85 < area.max() < 1.05
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.45
    centres = x[:, 0].mean((1, 2)) / 255
    assert centres.std() > 0.05 and abs(centres.mean() - 0.5) < 0.03


def test_augment_colours(small_data):
    """A grey image stays grey; brightness alone changes its mean, within 30 %."""
    x = small_data.recipe.augment(torch.full((200, 3, 8, 8), 100, dtype=torch.uint8), 8,
                           torch.Generator().manual_seed(0))
    x = x * torch.tensor(small_data.recipe.STD).view(3, 1, 1) + torch.tensor(
        small_data.recipe.MEAN).view(3, 1, 1)
    torch.testing.assert_close(x[:, 0], x[:, 1])
    assert 70 - 0.01 < x.min() < 75 and 125 < x.max() < 130 + 0.01


# --- models -----------------------------------------------------------------------------------

@pytest.mark.parametrize(('embed_dims', 'depths', 'size'), [
    (48, (2, 2, 4, 2), 96), (12, (1, 1, 1, 1), 32), (24, (1, 2, 3, 1), 64)])
def test_equal_parameters(small_data, args, embed_dims, depths, size):
    args.embed_dims, args.depths, args.size = embed_dims, depths, size
    args.d_state = 64 if embed_dims == 48 else 8
    args.models = ['vmamba-cross', 'vmamba-cascade', 'vmamba-ssd', 'vssd', 'swin']
    found = small_data.models.describe_models(5, args)
    counts = {name: m['parameters'] for name, m in found.items()}
    assert counts['vmamba-cross'] == counts['vmamba-cascade']
    for name, count in counts.items():
        assert abs(count / counts['vmamba-cross'] - 1) <= (0.02 if name == 'swin' else 0.01), name
        model = small_data.models.build(name, 5, args, found[name]['mlp_ratio'])
        assert count == sum(p.numel() for p in model.parameters())
        assert found[name]['flops'] > count  # a weight has several positions


def test_a_state_that_leaves_no_mlp(small_data, args):
    args.d_state = 200
    with pytest.raises(UserError, match='vmamba-ssd has more parameters .*--d-state'):
        small_data.models.match('vmamba-ssd', 5, args)


def test_unequal_parameters(small_data, args, monkeypatch):
    monkeypatch.setattr(small_data.models, 'match',
                        lambda name, *args: 2.0 if name == 'swin' else 4.0)
    with pytest.raises(UserError, match='more than 2% apart'):
        small_data.models.describe_models(5, args)


@pytest.mark.parametrize(('size', 'window'), [(32, 4), (64, 8), (96, 6), (128, 8), (160, 5),
                                              (224, 7), (384, 12)])
def test_windows_fit(small_data, args, size, window):
    """A window is as in Swin at 224, and divides every map that is larger than it."""
    assert small_data.models.window_of(size) == window
    assert all(side <= window or side % window == 0 for side in (size // 4 // 2 ** i
                                                                 for i in range(4)))


# --- training ---------------------------------------------------------------------------------

def make(small_data, args, splits, name='vmamba-cross', seed=0):
    return small_data.training.Training(name, 4.0, seed, splits, 2, 10, args)


def test_same_batches_for_all_models(small_data, args, splits):
    """Also in the second epoch, after the models have drawn numbers of their own."""
    seen = {}
    for name in ('vmamba-cross', 'swin'):
        training = make(small_data, args, splits, name)
        training.train_epoch()
        seen[name] = list(training.batches())
    first, second = seen.values()
    assert len(first) == len(splits['train']) // 8
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    other = next(make(small_data, args, splits, seed=1).batches())
    assert not torch.equal(first[0][0], other[0])


def test_scans_start_from_the_same_weights(small_data, args, splits):
    first, second = (make(small_data, args, splits, name).model.state_dict()
                     for name in ('vmamba-cross', 'vmamba-cascade'))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize('name', ['vmamba-bidirectional', 'vmamba-ssd', 'vssd', 'swin'])
def test_a_seed_repeats(small_data, args, splits, name):
    runs = []
    for seed in (0, 0, 1):
        training = make(small_data, args, splits, name, seed)
        rows = [training.run_epoch() for _ in range(2)]
        runs.append([(row['loss'], row['top1']) for row in rows])
    assert runs[0] == runs[1] != runs[2]


def test_decay_as_published(small_data, args, splits):
    """1-D parameters, biases and Swin's position biases have none."""
    for name in ('vmamba-cross', 'swin'):
        training = make(small_data, args, splits, name)
        names = {id(p): n for n, p in training.model.named_parameters()}
        groups = {g['weight_decay']: [names[id(p)] for p in g['params']]
                  for g in training.optimizer.param_groups}
        assert set(groups) == {0.0, small_data.recipe.RECIPE['weight_decay']}
        for n, p in training.model.named_parameters():
            free = p.ndim < 2 or n.endswith('.bias') or 'relative_position' in n
            assert n in groups[0.0 if free else small_data.recipe.RECIPE['weight_decay']]


def test_schedule(small_data):
    factors = [small_data.recipe.lr_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1 and factors[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert small_data.recipe.lr_factor(0, 1) == 1


@pytest.mark.parametrize('name', ['vmamba-cross', 'vmamba-ssd'])
def test_without_scan(small_data, args, splits, name):
    """What is left has no view of other positions but the convolutions'."""
    training = make(small_data, args, splits, name)
    for block in (b for stage in training.model.backbone.stages for b in stage.blocks):
        block.ssm.in_proj.weight.data.mul_(100)  # so that the scan matters before any training
    model = training.model.eval()
    x = next(training.batches())[0]
    with torch.no_grad():
        before = model(x)
        assert training.evaluate_without_scan() == training.evaluate()
        model.eval()
        alone = model(x)
        for block in (b for stage in model.backbone.stages for b in stage.blocks):
            block.ssm.A_logs.data.uniform_(-2, 2)
            block.ssm.dt_projs_bias.data.uniform_(-2, 2)
        assert torch.equal(model(x), alone) and not torch.allclose(before, alone, rtol=1e-3)


@pytest.mark.parametrize('name', ['vssd', 'swin'])
def test_models_without_a_scan_to_take_out(small_data, args, splits, name):
    assert make(small_data, args, splits, name).evaluate_without_scan() is None


def test_loss_that_is_no_number(small_data, args, splits):
    training = make(small_data, args, splits)
    next(training.model.parameters()).data.fill_(float('nan'))
    with pytest.raises(UserError, match='lower --lr'):
        training.run_epoch()


# --- report -----------------------------------------------------------------------------------

FINAL = {'vmamba-cross': (70.0, 74.0, 72.0), 'vmamba-cascade': (71.0, 73.0, 69.0),
         'swin': (60.0, 66.0, 63.0)}


@pytest.fixture
def results(small_data, tmp_path):
    """A run's files, with a best epoch before the last."""
    rows = [dict(model=name, seed=seed, epoch=epoch, loss=1.5,
                 top1=top1 if epoch == 3 else 20.0 + 30 * epoch, images_per_s=100.0 * epoch,
                 top1_no_scan=top1 - 5 if epoch == 3 and name != 'swin' else None)
            for name, final in FINAL.items() for seed, top1 in enumerate(final)
            for epoch in (1, 2, 3)]
    setting = dict(
        command='python tools/analysis/small_data.py --data flowers --epochs 3 '
                '--size 96 --batch-size 128 --lr 0.001', data='flowers',
        classes=['a', 'b', 'c', 'd', 'e'], train_images=800, val_images=300, chance=20.0, size=96,
        batch_size=128, epochs=3, steps=18, lr=1e-3, embed_dims=48, depths=[2, 2, 4, 2],
        conv_kernel=3, window=6, recipe=small_data.recipe.RECIPE, seeds=[0, 1, 2], dtype='fp16',
        cuda_graphs=False,
        device='some GPU', seconds=12.3, torch='2.14', timm='1.0', vmamba_mm='0.1', python='3.11',
        models={name: dict(parameters=1000 + i, flops=2_500_000, mlp_ratio=3.75)
                for i, name in enumerate(FINAL)})
    small_data.report.write(rows, setting, tmp_path / 'run')
    return tmp_path / 'run'


def test_report(small_data, call, results, tmp_path):
    """The last epoch counts, not the best; what is said follows from the seeds."""
    code, out, err = call(TOOL, '--results', results, '--report', tmp_path / 'docs/study.md')
    assert code == 0, err[-3000:]
    text = (tmp_path / 'docs/study.md').read_text()
    assert '| vmamba-cross | 1,000 | 2.5 | 72.0 | 2.0 | 70.0 to 74.0 | 67.0 | 200 |' in text
    assert '| vmamba-cascade | 1,001 | 2.5 | 71.0 | 2.0 | 69.0 to 73.0 | 66.0 | 200 |' in text
    assert '| swin | 1,002 | 2.5 | 63.0 | 3.0 | 60.0 to 66.0 | - | 200 |' in text
    assert '![Accuracy over epochs, and of each seed at the end](study.png)' in text
    assert ('    python tools/analysis/small_data.py --data flowers --epochs 3 --size 96 '
            '--batch-size 128 \\\n        --lr 0.001\n') in text
    flat = ' '.join(text.split())
    assert ('embed_dims 48 and depths (2, 2, 4, 2): `vmamba-*` are `tiny_s1l8`; with one seed '
            "their weights at the start are the same; `swin` is timm's Swin with heads (3, 6, 12, "
            '24) and windows of 6, with mlp_ratio 3.75 for equal parameters.') in flat
    assert 'vmamba-cross over swin (+9.0), vmamba-cascade over swin (+8.0).' in flat
    assert 'in points): vmamba-cross and vmamba-cascade (1.0).' in flat
    assert 'in 10 % of all studies' in flat and '3 pairs were compared' in flat
    assert 'changes by -5.0 (vmamba-cross), -5.0 (vmamba-cascade) points. - Val' in flat
    # sqrt(0.687 * 0.313 / 300) of the mean of all
    assert 'an accuracy of 69 % by 2.7 points' in flat
    assert 'some GPU, fp16 autocast; torch 2.14, timm 1.0' in flat
    assert '72.0' in out and str(tmp_path) not in text
    assert all(len(line) <= 100 or line[0] == '|' for line in text.splitlines())
    with Image.open(tmp_path / 'docs/study.png') as picture:
        assert picture.width > 1000


def test_what_the_models_are(small_data, results):
    _, setting = small_data.report.read(results)
    summary = {name: dict(mlp_ratio=2.5) for name in ('vmamba-cross', 'vmamba-ssd', 'vssd')}
    setting |= dict(d_state=64, conv_kernel=0)
    text = small_data.report.models_of(summary, setting)
    assert text.startswith('Models, all at embed_dims 48 and depths (2, 2, 4, 2): `vmamba-*` but '
                           '`vmamba-ssd` are `tiny_s1l8` without depthwise convolutions; with')
    assert ('`tiny_m2` with a state of 64 without depthwise convolutions, with mlp_ratio 2.5 for '
            "equal parameters; `vssd` is VSSD's `tiny` with heads (3, 6, 12, 24) and a state of "
            '64, with mlp_ratio 2.5') in text
    del summary['vmamba-cross']
    assert '`vmamba-*`' not in small_data.report.models_of(summary, setting)


def test_one_seed_claims_nothing(small_data, results):
    rows, setting = small_data.report.read(results)
    setting['seeds'] = [0]
    summary = small_data.report.summarise([r for r in rows if r['seed'] == 0], setting)
    assert summary['swin']['std'] is None and summary['swin']['mean'] == 60
    text = ' '.join(small_data.report.findings(summary, setting))
    assert 'no difference between models is claimed' in text
    assert 'over' not in text.split('on average.')[1]


def test_scans_that_hardly_matter(small_data, results):
    rows, setting = small_data.report.read(results)
    for row in rows:
        if row['top1_no_scan'] is not None:
            row['top1_no_scan'] = row['top1'] - 0.5
    text = ' '.join(small_data.report.findings(small_data.report.summarise(rows, setting), setting))
    assert 'the scans hardly take part' in text


# --- runs -------------------------------------------------------------------------------------

def test_end_to_end(call, data, tmp_path):
    """Red and blue squares are learnt by ours and by Swin."""
    code, out, err = call(TOOL, '--data', data, *SMALL, '--models', 'vmamba-ssd', 'swin',
                          '--seeds', 0, 1, '--epochs', 8, '--lr', 3e-3, '--out', tmp_path / 'out')
    assert code == 0, err[-3000:]
    with open(tmp_path / 'out/small_data.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(r['model'], r['seed'], r['epoch']) for r in rows] == [
        (m, s, str(e)) for m in ('vmamba-ssd', 'swin') for s in '01' for e in range(1, 9)]
    for first, last in zip(rows[::8], rows[7::8], strict=True):
        assert float(last['loss']) < float(first['loss'])
        assert float(last['top1']) > 90
    found = json.loads((tmp_path / 'out/small_data.json').read_text())
    assert found['setting']['classes'] == ['blue', 'red'] and found['setting']['chance'] == 50
    assert found['setting']['steps'] == 8 * (20 // 8)
    assert found['summary']['swin']['top1'] == [float(rows[23]['top1']), float(rows[31]['top1'])]
    assert str(tmp_path) not in found['setting']['command']
    assert (tmp_path / 'out/small_data.png').is_file()


def test_name_of_data(small_data, tmp_path):
    """As it is given, but for what leads to it on this machine."""
    for given, name in (('data/demo/imagenet', 'data/demo/imagenet'), ('../flowers', 'flowers'),
                        (tmp_path / 'flowers', 'flowers')):
        assert small_data.main.name_of(Path(given)) == name


def test_minutes(small_data, args, splits, monkeypatch):
    """As many epochs as fit, the same for all; too few minutes say so."""
    models = {name: dict(mlp_ratio=4.0) for name in ('vmamba-cross', 'swin')}
    clock = iter(np.arange(0, 1000, 1.0))
    monkeypatch.setattr(small_data.training.time, 'perf_counter', lambda: next(clock))
    # run_epoch looks at the clock twice. A timed epoch of a model takes 3 ticks, building it 1:
    # 2 models and 2 seeds are 12 and 4. The timing itself ends at 14.
    args.minutes = 1
    found = small_data.training.find_epochs(models, splits, 2, args, start=0)
    assert found == int(0.9 * (60 - 14 - 4) / 12)
    args.minutes = 0.2
    with pytest.raises(UserError, match='too short: one epoch .* takes 12.0 s'):
        small_data.training.find_epochs(models, splits, 2, args, start=next(clock))


def test_mistakes(call, data, tmp_path):
    def fails(*argv, words):
        assert_one_line(call(TOOL, *argv), *words)

    fails('--data', tmp_path / 'no', *SMALL, words=[tmp_path / 'no/train', 'class'])
    fails('--data', data, *SMALL, '--batch-size', 21, words=['20 images', '--batch-size'])
    fails('--data', data, '--size', 40, words=['--size', 'multiple of 32'])
    fails('--data', data, '--epochs', 0, words=['--epochs', 'above 0'])
    fails('--data', data, *SMALL, '--dtype', 'fp16', words=['--dtype fp16', 'GPU'])
    fails('--data', data, *SMALL, '--cuda-graphs', words=['--cuda-graphs', 'GPU'])
    fails('--results', tmp_path, words=['small_data.csv', '--results'])
    fails('--results', tmp_path, '--report', tmp_path / 'a.txt', words=['--report', '.md'])
    Path(data / 'val/blue').rename(data / 'val/green')
    fails('--data', data, *SMALL, words=['same classes', 'blue', 'green'])
    Path(data / 'val/green').rename(data / 'val/blue')
    (data / 'train/red/0.png').write_bytes(b'no image')
    fails('--data', data, *SMALL, words=['0.png', 'corrupt'])
