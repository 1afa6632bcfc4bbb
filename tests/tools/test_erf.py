"""tools/analysis/erf.py: effective receptive fields that are known, and runs of the tool."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_tools_errors import assert_one_line
from torch import nn

from vmamba_mm.mm.inputs import drop_pretrained

TOOL = 'analysis/erf.py'
RESNET = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'


@pytest.fixture
def erf(load_tool):
    return load_tool('analysis/erf.py')


@pytest.fixture
def images(tmp_path):
    for i in range(3):
        tiny.write_image(tmp_path / 'images' / f'{i}.png', (90, 120, 60), np.random.default_rng(i))
    return tmp_path / 'images'


def box(size, side, centre):
    """Ones in a square of odd side around pixel (centre, centre)."""
    found = np.zeros((size, size))
    found[centre - side // 2:centre + side // 2 + 1, centre - side // 2:centre + side // 2 + 1] = 1
    return found


def conv(weight, stride=1):
    layer = nn.Conv2d(weight.shape[1], len(weight), weight.shape[-1], stride,
                      weight.shape[-1] // 2, bias=False)
    layer.weight.data = weight
    return layer


# --- known fields -----------------------------------------------------------------------------

@pytest.mark.parametrize(('threshold', 'side'), [(0.2, 5), (0.3, 5), (0.5, 7), (0.99, 9)])
@pytest.mark.parametrize('size', [40, 41])
def test_area_ratio_of_a_box(erf, size, threshold, side):
    """25 of 81 pixels are the first of a centred square to be above 20 % and 30 %."""
    found = erf.area_ratio(box(size, 9, size // 2), threshold)
    assert found == (side, (side / size) ** 2)


def test_area_ratio_of_extremes(erf):
    assert erf.area_ratio(box(8, 1, 4), 0.99) == (1, 1 / 64)
    assert erf.area_ratio(np.ones((8, 8)), 0.99) == (8, 1)
    assert erf.area_ratio(np.ones((9, 9)), 0.99) == (9, 1)


def test_table_of_a_box(erf):
    """Equal contributions are equal on both scales."""
    rows = erf.tabulate({('m', erf.BEFORE): 3 * box(40, 9, 20)})
    assert [row['score'] for row in rows] == ['log', 'plain']
    for row in rows:
        assert [row[f'side{t}'] for t in (20, 30, 50, 99)] == [5, 5, 7, 9]
        assert row['r99'] == (9 / 40) ** 2
    tall = {('m', erf.BEFORE): 3 * box(40, 9, 20) + 1e6 * box(40, 1, 20)}
    assert [row['side50'] for row in erf.tabulate(tall)] == [7, 1]


def test_one_convolution_is_its_kernel(erf):
    found = erf.contributions(conv(torch.ones(2, 3, 5, 5)), torch.rand(1, 3, 16, 16) + 1)
    np.testing.assert_array_equal(found, 2 * 3 * box(16, 5, 8))


def test_stack_of_convolutions(erf):
    """5x5, then 3x3 of stride 2: the centre (8, 8) of 16x16 sees (16, 16) of the input."""
    stack = nn.Sequential(conv(torch.ones(2, 3, 5, 5)), conv(torch.ones(4, 2, 3, 3), stride=2))
    images = torch.rand(2, 3, 32, 32) + 1
    line = np.zeros(32)
    line[16 - 3:16 + 4] = np.convolve(np.ones(5), np.ones(3))
    expected = 2 * 3 * 2 * 4 * np.outer(line, line)  # images, colours, channels
    np.testing.assert_allclose(erf.contributions(stack, images), expected, rtol=1e-6)


def test_signs(erf):
    """A channel below zero counts nothing; of the others, the gradient's sign by choice."""
    weight = torch.zeros(2, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([2.0, 2.0, -1.0])
    weight[1, 0] = -1
    image = torch.ones(1, 1, 9, 9)
    for gradient, expected in (('absolute', [2, 2, 1]), ('positive', [2, 2, 0])):
        found = erf.contributions(conv(weight), image, gradient)
        np.testing.assert_array_equal(found[4, 3:6], expected)
        assert found.sum() == sum(expected)


class Tokens(nn.Module):
    """A convolution that returns tokens, behind extra ones that see the whole image."""

    def __init__(self, extra, swap=False):
        super().__init__()
        self.conv = conv(torch.ones(2, 3, 5, 5))
        self.extra, self.swap = extra, swap
        self.embed_dims = 2

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        whole = tokens.mean(1, keepdim=True).expand(-1, self.extra, -1)
        tokens = torch.cat((whole, tokens), 1)
        return (tokens.transpose(1, 2) if self.swap else tokens,)


@pytest.mark.parametrize(('extra', 'swap'), [(0, False), (1, False), (2, False), (0, True)])
def test_tokens(erf, extra, swap):
    backbone = Tokens(extra, swap)
    if extra == 2:
        backbone.num_extra_tokens = 2
    found = erf.contributions(backbone, torch.rand(1, 3, 16, 16) + 1)
    np.testing.assert_array_equal(found, 2 * 3 * box(16, 5, 8))


@pytest.mark.parametrize('shape', [(1, 8), (1, 11, 8)])
def test_no_map(erf, shape):
    with pytest.raises(erf.UserError, match='returns no feature map'):
        erf.as_map(torch.ones(shape), nn.Identity())


def test_random_weights_are_random():
    """No checkpoint that a config starts from is loaded."""
    pretrained = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    kaiming = dict(type='Kaiming', layer='Conv2d')
    model = dict(pretrained='open-mmlab://resnet50_v1c', backbone=dict(init_cfg=pretrained),
                 teachers=[dict(init_cfg=[kaiming, pretrained], pretrained=True)])
    drop_pretrained(model)
    assert model == dict(pretrained=None, backbone=dict(init_cfg=None),
                         teachers=[dict(init_cfg=[kaiming], pretrained=False)])


# --- runs -------------------------------------------------------------------------------------

def run(call, out, *argv):
    code, printed, err = call(TOOL, *argv, '--device', 'cpu', '--out', out)
    assert code == 0, err[-3000:]
    with open(Path(out) / 'erf.csv', newline='') as file:
        return list(csv.DictReader(file)), printed


@pytest.fixture
def trained(projects, tmp_path):
    """A checkpoint of ours whose SS2D returns zero, which leaves the convolutions."""
    checkpoint = torch.load(projects('cls')[1], weights_only=True)
    for name, value in checkpoint['state_dict'].items():
        if name.endswith('ssm.out_proj.weight'):
            value.zero_()
    torch.save(checkpoint, tmp_path / 'trained.pth')
    return tmp_path / 'trained.pth'


def test_before_and_after(call, projects, trained, images, tmp_path):
    """Ours with a checkpoint beside a stock ResNet without; again, the same files."""
    config = projects('cls')[0]
    argv = [config, RESNET, '--checkpoint', trained, 'none', '--images', images,
            '--num-images', 2, '--size', 128]
    rows, printed = run(call, tmp_path / 'a', *argv)
    assert [(row['model'], row['state'], row['score']) for row in rows] == [
        (model, f'{state} training', score)
        for model, state in (('config', 'before'), ('config', 'after'),
                             ('resnet18_8xb32_in1k', 'before')) for score in ('log', 'plain')]
    for row in rows:
        ratios = [float(row[f'r{t}']) for t in (20, 30, 50, 99)]
        assert 0 < ratios[0] <= ratios[1] <= ratios[2] < ratios[3] <= 1
        assert ratios[3] == (int(row['side99']) / 128) ** 2
        assert f'{100 * ratios[3]:.2f} %' in printed
    # Two convolutions of the stem and three that downsample: 3x3, each of stride 2.
    assert int(rows[0]['side99']) > 1 + 2 * (1 + 2 + 4 + 8 + 16) >= int(rows[2]['side99'])
    report = json.loads((tmp_path / 'a/erf.json').read_text())
    assert report['setting']['size'] == 128 and len(report['setting']['images']) == 2
    assert str(report['rows'][0]['r99']) == rows[0]['r99']
    with Image.open(tmp_path / 'a/erf.png') as picture:
        assert picture.width > 700 and picture.height > 900  # two columns, two rows
    run(call, tmp_path / 'b', *argv)
    for name in ('erf.csv', 'erf.json', 'erf.png'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


def test_stock_backbones(call, images, tmp_path):
    """Tokens, a pooled map, windows, a detector that starts from a checkpoint in the web."""
    stock = ['mmpretrain::deit/deit-tiny_4xb256_in1k.py',
             'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
             'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
             'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
    rows, _ = run(call, tmp_path / 'out', *stock, '--images', images / '0.png', '--size', 224)
    plain = {row['model'].split('_')[0]: int(row['side99']) for row in rows
             if row['score'] == 'plain'}
    # DeiT and Swin see all. ConvNeXt's blocks begin with a weight of 1e-6, ResNet's with 0: what
    # is left are a patch of 32 pixels, and the 11 pixels of the 7x7 convolution and 3x3 pooling,
    # whose centre is 16 pixels from that of 224 pixels.
    assert plain['deit-tiny'] > 200 and plain['swin-tiny'] > 200
    assert plain['convnext-tiny'] == 33
    assert plain['mask-rcnn'] == 11 + 2 * 16


def test_one_input_size(call, images):
    mixer = 'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py'
    assert_one_line(call(TOOL, mixer, '--images', images, '--size', 64), 'MlpMixer',
                    'does not take images of 64x64', 'try --size 224')


def test_mistakes(call, projects, images, tmp_path):
    config, checkpoint, _ = projects('cls')
    assert_one_line(call(TOOL, config, '--checkpoint', checkpoint, checkpoint, '--images', images),
                    '1 config(s) and 2 checkpoint(s)', "'none'")
    assert_one_line(call(TOOL, RESNET, '--checkpoint', checkpoint, '--images', images), checkpoint,
                    'does not fit', 'backbone.conv1.weight')
    assert_one_line(call(TOOL, config, '--images', tmp_path / 'no'), 'no', 'does not exist')
    assert_one_line(call(TOOL, config, '--images', images, '--num-images', 0), '--num-images')
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'not an image')
    assert_one_line(call(TOOL, config, '--images', bad), bad, 'corrupt')
    other = tmp_path / 'other.py'
    other.write_text("default_scope = 'mmpretrain'\n"
                     "model = dict(type='LinearClsHead', num_classes=2, in_channels=3)\n")
    assert_one_line(call(TOOL, other, '--images', images), 'LinearClsHead', 'no backbone')
