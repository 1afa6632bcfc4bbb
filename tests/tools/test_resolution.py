"""tools/analysis/resolution.py: each of its measures on what is known, and runs of the tool."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_tools_errors import assert_one_line
from torch import nn

from vmamba_mm.mm import measuring

TOOL = 'analysis/resolution.py'
OURS = str(tiny.ROOT / 'configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py')
DEIT = 'mmpretrain::deit/deit-small_4xb256_in1k.py'
SWIN = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
VIT = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VisionTransformer', patch_size=8, img_size=32, arch=dict(
        embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)),
    head=dict(type='VisionTransformerClsHead', num_classes=2, in_channels=16))
data_preprocessor = dict(num_classes=2, mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True)
"""


@pytest.fixture
def tool(load_tool, mm):
    return load_tool('analysis/resolution.py')


@pytest.fixture
def vit(tmp_path):
    path = tmp_path / 'vit.py'
    path.write_text(VIT)
    return path


def options(**kwargs):
    return SimpleNamespace(**dict(seed=0, weights='auto', device='cpu', dtype='fp32',
                                  num_images=None) | kwargs)


def make_subject(tool, config, checkpoint='none'):
    return tool.Subject('m', tool.cli.load_config(str(config)), str(checkpoint), options())


# --- fits and labels --------------------------------------------------------------------------

@pytest.mark.parametrize('power', [1, 2])
def test_fit_of_a_known_growth(tool, power):
    sizes = (8, 16, 24, 32)
    fit = tool.report.fit_growth(sizes, [5 * (s * s)**power for s in sizes])
    assert fit['exponent'] == pytest.approx(power) and fit['factor'] == pytest.approx(5)
    if power == 1:
        assert fit['slope'] == pytest.approx(5) and fit['r2'] == pytest.approx(1)
        assert abs(fit['intercept']) < 1e-9 and fit['worst'] < 1e-12
    else:
        assert fit['r2'] < 0.99 and 0.05 < fit['worst'] < 0.2


def test_no_fit_of_two_sizes(tool):
    assert tool.report.fit_growth((224, 384), (1, 2)) is None


@pytest.mark.parametrize('heights, expected', [
    ([0.1, 0.9], [0.1, 0.9]), ([0.5, 0.5], [0.55, 0.45]), ([0.52, 0.5], [0.56, 0.46]),
    ([0.0, 0.05, 0.1, 0.2], [-0.0625, 0.0375, 0.1375, 0.2375]), ([], []),
    ([2.5, 2.51, 3.5, 2.505, 2.45], [2.34125, 2.44125, 2.54125, 2.64125, 3.5])])
def test_labels_are_apart(load_tool, heights, expected):
    found = load_tool('analysis/curve_labels.py').spread(heights, 0.1)
    assert sorted(found) == pytest.approx(sorted(expected))
    assert all(b - a > 0.1 - 1e-9 for a, b in zip(sorted(found), sorted(found)[1:], strict=False))
    for i, a in enumerate(heights):
        for j, b in enumerate(heights):
            assert a <= b or found[i] > found[j]  # the order stays


# --- sizes ------------------------------------------------------------------------------------

def steps(*found):
    return [dict(type='LoadImageFromFile'), *found, dict(type='PackInputs')]


@pytest.mark.parametrize('before, size, after', [
    (steps(dict(type='ResizeEdge', scale=256, edge='short'),
           dict(type='CenterCrop', crop_size=224)), 384,
     steps(dict(type='ResizeEdge', scale=438, edge='short'),
           dict(type='CenterCrop', crop_size=384))),
    (steps(dict(type='mmpretrain.ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)),
     224, steps(dict(type='mmpretrain.ResizeEdge', scale=256),
                dict(type='CenterCrop', crop_size=224))),
    (steps(dict(type='Resize', scale=(32, 32))), 48, steps(dict(type='Resize', scale=(48, 48)))),
    (steps(dict(type='EfficientNetCenterCrop', crop_size=240)), 480,
     steps(dict(type='EfficientNetCenterCrop', crop_size=480, crop_padding=64)))])
def test_pipeline_of_another_size(tool, before, size, after):
    tool.scale_pipeline(before, size)
    assert before == after


@pytest.mark.parametrize('pipeline, words', [
    (steps(dict(type='ResizeEdge', scale=256)), 'no step that makes images of one size'),
    (steps(dict(type='Resize', scale=(32, 64))), 'not square')])
def test_pipeline_without_a_size(tool, pipeline, words):
    with pytest.raises(tool.UserError, match=words):
        tool.scale_pipeline(pipeline, 64)


def test_position_embedding(tool, vit, tmp_path):
    """Built for 64 with the weights of 32, a ViT gives what mmpretrain's own resizing gives."""
    own = make_subject(tool, vit).build_at(32)
    own.backbone.pos_embed.data.normal_()
    torch.save(dict(state_dict=own.state_dict()), tmp_path / 'vit.pth')
    subject = make_subject(tool, vit, tmp_path / 'vit.pth')
    assert subject.has_size
    larger = subject.build_at(64)
    assert own.backbone.pos_embed.shape[1] == 1 + 4 * 4
    assert larger.backbone.pos_embed.shape[1] == 1 + 8 * 8
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(larger(x, mode='tensor'), own(x, mode='tensor'))
    assert not make_subject(tool, OURS).has_size


def test_weights_of_one_size(tool):
    """The mixing of an MLP-Mixer is of one size: another has other parameters."""
    mixer = 'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py'
    subject = make_subject(tool, mixer)
    subject.state = subject.build_at(224).state_dict()
    with pytest.raises(tool.UserError, match='does not fit the weights .* to 64x64'):
        subject.build_at(64)


def test_growth_of_flops(tool):
    """Ours is linear to the digit: convolutions, scans; DeiT has products of all pairs."""
    sizes, fits = (224, 512, 1024), {}
    for config in (OURS, DEIT):
        subject = make_subject(tool, config)
        fits[config] = tool.report.fit_growth(sizes, [subject.count_at(s).flops for s in sizes])
    assert fits[OURS]['exponent'] == pytest.approx(1, abs=1e-3) and fits[OURS]['worst'] < 1e-9
    assert fits[OURS]['intercept'] == pytest.approx(768 * 1000)  # the head, once
    assert fits[DEIT]['exponent'] > 1.25 and fits[DEIT]['worst'] > 0.02


# --- accuracy ---------------------------------------------------------------------------------

class ByColour:
    """A classifier that knows red from blue, if it may."""

    def __init__(self, blind):
        self.blind, self.shapes = blind, []

    def test_step(self, data):
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            self.shapes.append(tuple(image.shape))
            blue, _, red = image.float().mean((1, 2))
            score = torch.tensor([1.0, 0.0] if self.blind or blue > red else [0.0, 1.0])
            sample.set_pred_score(score).set_pred_label(score.argmax())
        return data['data_samples']


def test_accuracy_of_known_predictions(tool, projects):
    cfg = tool.cli.load_config(str(projects('cls')[0]))
    tool.cli.set_loader_defaults(cfg, tool.cli.find_task(cfg))
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.default_scope)
    for blind, expected in ((False, 100), (True, 50)):
        model = ByColour(blind)
        # 5 of 12, 6 of each class: the 1st, 3rd, 5th, 8th and 10th.
        for count, images, share in ((None, 12, expected), (5, 5, 60 if blind else 100)):
            found = tool.measure_accuracy(model, cfg, 48, 4, options(num_images=count))
            assert found == (pytest.approx(share), images)
        assert set(model.shapes) == {(3, 48, 48)}


def test_accuracy_is_that_of_the_test_tool(call, projects, tmp_path):
    config, checkpoint, _ = projects('cls')
    code, _, err = call('test.py', config, checkpoint, '--out', tmp_path / 'm.json')
    assert code == 0, err[-2000:]
    rows, _ = run(call, tmp_path / 'out', config, '--checkpoint', checkpoint, '--resolutions', 32)
    metrics = json.loads((tmp_path / 'm.json').read_text())
    assert float(rows[0]['accuracy']) == pytest.approx(metrics['accuracy/top1'])


# --- speed and memory -------------------------------------------------------------------------

class Wrong(nn.Module):
    def __init__(self, shape, value):
        super().__init__()
        self.shape, self.value = shape, value
        self.head = SimpleNamespace(num_classes=5)

    def forward(self, x, mode):
        return torch.full(self.shape, self.value)


@pytest.mark.parametrize('shape, value, words', [
    ((2, 5), float('nan'), 'not finite'), ((2, 5), float('inf'), 'not finite'),
    ((2, 4), 0.0, r'\(2, 4\) instead of \(2, 5\)'), ((1, 5), 0.0, 'instead of')])
def test_wrong_output_is_not_timed(tool, monkeypatch, shape, value, words):

    monkeypatch.setattr(measuring, 'median', lambda *args: pytest.fail('was timed'))
    with pytest.raises(tool.UserError, match=words):
        tool.measure_speed(Wrong(shape, value), 8, 2, options(), 'm')


@pytest.mark.skipif(sys.platform != 'linux', reason='the mark of /proc is of Linux')
def test_memory_of_a_known_call(tool):
    """96 MiB at once, after a larger peak and 200 MiB of it kept, count as 96."""

    def allocate(mib):
        return torch.zeros(mib, 2**20, dtype=torch.uint8) + 1  # two at a time

    allocate(150)
    kept = allocate(200)
    held, peak = measuring.held_and_peak(lambda: allocate(48), on_gpu=False)
    assert (peak - held) / 2**20 == pytest.approx(96, abs=6)
    assert kept.sum() > 0


def test_time_of_a_known_call(tool):
    import time


    assert 20 <= measuring.median(lambda: time.sleep(0.02), on_gpu=False, spend=50) < 60


def test_memory_that_is_used_up(tool, monkeypatch, vit, tmp_path):
    """The other sizes are measured and drawn nevertheless."""
    speed = tool.measure_speed

    def measure_speed(model, size, *args):
        if size == 64:
            raise torch.OutOfMemoryError
        return speed(model, size, *args)

    monkeypatch.setattr(tool, 'measure_speed', measure_speed)
    subject = make_subject(tool, vit)
    subject.no_accuracy = 'no checkpoint'
    rows = [tool.measure(subject, subject.count_at(size), size, 1, options())
            for size in (32, 64, 96)]
    assert ['memory is used up' in row['problem'] for row in rows] == [False, True, False]
    assert [row['images_per_s'] is None for row in rows] == [False, True, False]
    found = tool.report.draw_all(rows, dict(device='CPU', dtype='fp32'), tmp_path)
    assert {'flops.png', 'throughput.png'} <= set(found) and 'accuracy.png' not in found


# --- runs -------------------------------------------------------------------------------------

def run(call, out, *argv):
    code, printed, err = call(TOOL, *argv, '--device', 'cpu', '--out', out)
    assert code == 0, err[-3000:]
    with open(out / 'resolution.csv', newline='') as file:
        return list(csv.DictReader(file)), printed


def test_ours_beside_a_peer(call, tool, projects, vit, tmp_path):
    """Then again without a checkpoint and two sizes: no old picture of accuracy stays."""
    config, checkpoint, _ = projects('cls')
    argv = [config, vit, '--checkpoint', checkpoint, 'none', '--resolutions', 64, 32, 96,
            '--num-images', 4, '--batch-size', 8]
    rows, printed = run(call, tmp_path, *argv)
    assert [(r['model'], r['resolution'], r['batch']) for r in rows] == [
        (model, size, batch) for model in ('config', 'vit')
        for size, batch in (('32', '8'), ('64', '2'), ('96', '1'))]
    for row in rows:
        subject = make_subject(tool, config if row['model'] == 'config' else vit)
        assert int(row['flops']) == subject.count_at(int(row['resolution'])).flops
        assert float(row['images_per_s']) == pytest.approx(
            int(row['batch']) / float(row['ms']) * 1e3)
        assert row['problem'] == ''
        if row['model'] == 'config':
            assert 0 <= float(row['accuracy']) <= 100 and row['images'] == '4'
        else:
            assert row['accuracy'] == row['images'] == ''
        if sys.platform == 'linux':
            assert float(row['peak_mib']) > 0 and float(row['mib_per_image']) > 0
    report = json.loads((tmp_path / 'resolution.json').read_text())
    assert report['setting']['no_accuracy'] == {'vit': 'no checkpoint'}
    assert report['fits']['config']['exponent'] == pytest.approx(1, abs=0.02)
    assert 'pixels^1.0' in printed and 'no accuracy: no checkpoint' in printed
    for name in ('accuracy', 'flops', 'throughput', 'memory'):
        assert (tmp_path / f'{name}.png').stat().st_size > 5000

    rows, printed = run(call, tmp_path, config, '--resolutions', 32, 64)
    assert not (tmp_path / 'accuracy.png').exists() and (tmp_path / 'flops.png').exists()
    assert 'it needs 3 sizes' in printed and len(rows) == 2


def test_missing_data_are_said(call, projects, tmp_path):
    config, checkpoint, _ = projects('cls')
    rows, printed = run(call, tmp_path, config, '--checkpoint', checkpoint, '--resolutions', 32,
                        '--cfg-options', 'test_dataloader.dataset.data_root=nowhere')
    assert 'no accuracy: the data set is missing: nowhere' in printed
    assert rows[0]['accuracy'] == '' and float(rows[0]['images_per_s']) > 0


def test_mistakes(call, projects, tmp_path):
    config, checkpoint, _ = projects('cls')
    assert_one_line(call(TOOL, config, '--checkpoint', checkpoint, checkpoint),
                    '1 config(s) and 2 checkpoint(s)', "'none'")
    assert_one_line(call(TOOL, OURS, '--checkpoint', checkpoint), checkpoint, 'backbone.')
    assert_one_line(call(TOOL, config, '--resolutions', 0, 32), '--resolutions', 'at least 1')
    assert_one_line(call(TOOL, config, '--batch-size', 0), '--batch-size', 'at least 1')
    assert_one_line(call(TOOL, config, '--device', 'cpu', '--dtype', 'fp16'), '--dtype fp16', 'GPU')
    assert_one_line(call(TOOL, SWIN, '--resolutions', 48), 'swin-tiny', '48x48', 'pad_small_map')
    assert_one_line(call(TOOL, projects('seg')[0]), 'no classifier', 'dense_steps.py')
