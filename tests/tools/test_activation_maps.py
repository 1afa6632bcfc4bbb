"""tools/analysis/activation_maps.py: maps that are known, and runs of the tool."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.testing import ss2d_scan_inputs

TOOL = 'analysis/activation_maps.py'
RESNET = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
SIZE = 64  # maps of 16, 8, 4 and 2 pixels


@pytest.fixture
def tool(load_tool):
    return load_tool('analysis/activation_maps.py')


@pytest.fixture
def image(tmp_path):
    """40 wide, 20 high."""
    path = tmp_path / 'images/photo.png'
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


# --- parts ------------------------------------------------------------------------------------

def passed(height, width, row, column):
    """Where the four routes have been when they are at a pixel."""
    i, j = np.mgrid[:height, :width]
    by_rows, by_columns = i * width + j, j * height + i
    return np.stack([by_rows <= row * width + column, by_columns <= column * height + row,
                     by_rows >= row * width + column, by_columns >= column * height + row])


def test_maps_of_one_channel_and_state(tool):
    """With N = 1 and D = 1 everything is a product: a = C_t B_i exp(A (delta sums))."""
    inputs = ss2d_scan_inputs(1, 1, 3, 4, rank=1, dtype=torch.float64)
    x, x_proj, dt_weight, dt_bias, A, _ = inputs.values()
    maps = {kind: tool.find_maps(inputs.values(), (1, 2), kind) for kind in tool.MAPS}
    for found in maps.values():
        np.testing.assert_array_equal(np.isnan(found), ~passed(3, 4, 1, 2))
    u = x[0, 0].flatten()
    for k, order in enumerate([np.arange(12), np.arange(12).reshape(3, 4).T.ravel()] * 2):
        order = order[::-1] if k > 1 else order
        steps = order[:list(order).index(1 * 4 + 2) + 1].copy()
        dt, B, C = (x_proj[k, :, 0, None] * u[steps]).unbind(0)
        delta = F.softplus(dt_weight[k, 0, 0] * dt + dt_bias[k, 0])
        decay = torch.exp(A[k, 0] * (delta.sum() - delta.cumsum(0)))
        expected = {'qk': C[-1] * B, 'attention': C[-1] * B * decay,
                    'contribution': C[-1] * B * decay * delta * u[steps]}
        for kind, values in expected.items():
            np.testing.assert_allclose(maps[kind][k].ravel()[steps], values.abs(), rtol=1e-10)


def test_mean_of_absolute_values_over_channels(tool):
    """Two channels of opposite signs do not cancel."""
    inputs = ss2d_scan_inputs(1, 1, 3, 4, dtype=torch.float64)
    one = tool.find_maps(inputs.values(), (2, 0), 'contribution')
    x, x_proj, dt_weight, dt_bias, A, D = inputs.values()
    # The second channel is minus the first, and only the first is projected to dt, B and C.
    two = (torch.cat([x, -x], 1), F.pad(x_proj, (0, 1)), dt_weight.repeat(1, 2, 1),
           dt_bias.repeat(1, 2), A.repeat_interleave(2, 0), D.repeat_interleave(2))
    np.testing.assert_allclose(tool.find_maps(two, (2, 0), 'contribution'), one, rtol=1e-12)


def test_shares(tool):
    maps = np.array([[[1, 2]], [[np.nan, 3]], [[4, np.nan]], [[0, 0]]])
    assert tool.find_shares(maps) == [0.3, 0.3, 0.4, 0]


@pytest.mark.parametrize(('pixel', 'expected'), [
    (('0.5', '0.25'), (0.5, 0.25)), (('0', '0'), (0.5 / 20, 0.5 / 40)),
    (('19', '39'), (19.5 / 20, 39.5 / 40)), (('10', '0.999'), (10.5 / 20, 0.999))], ids=str)
def test_position(tool, image, pixel, expected):
    assert tool.find_position(pixel, image) == expected


@pytest.mark.parametrize(('pixel', 'match'), [
    (('20', '0'), 'height and width are 20 and 40'), (('0', '-1'), 'outside'),
    (('1.0', '0.5'), 'below 1.0'), (('a', '0'), "'a' is neither"), (('1e1', '0'), 'neither'),
    (('0', '.'), "'.' is neither")], ids=str)
def test_wrong_position(tool, image, pixel, match):
    with pytest.raises(tool.UserError, match=match):
        tool.find_position(pixel, image)


def test_blocks(tool):
    """The last of the first three stages, or those named, as far as the backbone runs."""
    from vmamba_mm.models import VMamba

    arch = dict(embed_dims=8, depths=(1, 2, 3, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
                conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
                scan='cross')
    backbone = VMamba(arch)
    found = tool.find_blocks(backbone, [])
    assert list(found) == ['0.0', '1.1', '2.2']
    assert found['2.2'] is backbone.stages[2].blocks[2].ssm
    assert list(tool.find_blocks(backbone, ['3.0', '1.0', '3.0'])) == ['3.0', '1.0']
    short = VMamba(arch, out_indices=(0, 1))
    assert list(tool.find_blocks(short, [])) == ['0.0', '1.1']
    with pytest.raises(tool.UserError, match=r'--block 2.0: .* choose of 0.0, 1.0 to 1.1$'):
        tool.find_blocks(short, ['2.0'])


# --- runs -------------------------------------------------------------------------------------

def run(call, project, out, *argv):
    config, checkpoint, _ = project
    code, _, err = call(TOOL, config, '--checkpoint', checkpoint, *argv, '--size', SIZE,
                        '--device', 'cpu', '--out', out)
    assert code == 0, err[-3000:]
    report = json.loads((out / 'activation_maps.json').read_text())
    return report, {name: np.load(out / f'{name}.npz') for name in report['images']}


def scan_inputs(project, image, stage):
    """Of the first block of a stage, by hand and by a hook on its convolution."""
    from mmengine.config import Config

    from vmamba_mm.models import VMamba

    backbone = dict(Config.fromfile(project[0]).model.backbone)
    backbone.pop('type')
    model = VMamba(**backbone).eval()
    state = torch.load(project[1], weights_only=True)['state_dict']
    model.load_state_dict({k.removeprefix('backbone.'): v for k, v in state.items()
                           if k.startswith('backbone.')})
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    x = torch.from_numpy((pixels.astype(np.float32) - 120) / 60).permute(2, 0, 1)[None]
    ssm, found = model.stages[stage].blocks[0].ssm, []
    ssm.conv2d.register_forward_hook(lambda m, i, y: found.append(F.silu(y)))
    with torch.no_grad():
        model(x)
    return (found[0], ssm.x_proj_weight.detach(), ssm.dt_projs_weight.detach(),
            ssm.dt_projs_bias.detach(), -ssm.A_logs.detach().exp(), ssm.Ds.detach())


def test_default_blocks(call, tool, projects, image, tmp_path):
    """One picture; the maps are those of the model's own blocks at the query."""
    project = projects('cls')
    report, maps = run(call, project, tmp_path / 'out', image, '--pixel', 3, '0.6')
    assert report['setting']['size'] == SIZE and report['setting']['map'] == 'attention'
    assert report['setting']['routes'] == ['row-major', 'column-major', 'reversed row-major',
                                           'reversed column-major']
    found = report['images']['photo']
    assert found['position'] == [3.5 / 20, 0.6]
    assert list(found['blocks']) == maps['photo'].files == ['0.0', '1.0', '2.0']
    for stage, (block, side) in enumerate(zip(found['blocks'], (16, 8, 4), strict=True)):
        query = int(side * 3.5 / 20), int(side * 0.6)
        assert tuple(found['blocks'][block]['query']) == query
        assert sum(found['blocks'][block]['shares']) == pytest.approx(1)
        assert maps['photo'][block].dtype == np.float32
        np.testing.assert_array_equal(np.isnan(maps['photo'][block]), ~passed(side, side, *query))
        expected = tool.find_maps(scan_inputs(project, image, stage), query, 'attention')
        np.testing.assert_allclose(maps['photo'][block], expected, rtol=1e-3, atol=1e-9)
    with Image.open(tmp_path / 'out/photo.png') as picture:
        assert picture.width > 1200 and picture.height > 700


def test_chosen_blocks_of_several_images(call, projects, image, tmp_path):
    """The same name from two folders, two blocks, once each."""
    other = tmp_path / 'other/photo.png'
    other.parent.mkdir()
    Image.open(image).rotate(180).save(other)
    report, maps = run(call, projects('cls'), tmp_path / 'out', image, other, '--map',
                       'contribution', '--block', '3.0', '1.0', '3.0')
    assert list(report['images']) == ['photo', 'photo_1']
    assert [found['image'] for found in report['images'].values()] == [str(image), str(other)]
    for found in maps.values():
        assert found.files == ['3.0', '1.0'] and found['1.0'].shape == (4, 8, 8)
    assert not np.allclose(maps['photo']['1.0'], maps['photo_1']['1.0'], equal_nan=True)
    assert (tmp_path / 'out/photo_1.png').is_file()


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_other_tasks(call, projects, image, tmp_path, task):
    _, maps = run(call, projects(task), tmp_path / 'out', image, '--map', 'qk')
    assert maps['photo']['0.0'].shape == (4, 16, 16)


def test_mistakes(call, tool, projects, image, tmp_path):
    config, checkpoint, _ = projects('cls')
    start = (TOOL, config, '--checkpoint', checkpoint)
    assert_one_line(call(*start, tmp_path / 'no.png'), 'no.png', 'does not exist')
    assert_one_line(call(*start, image, '--pixel', 20, 0), 'outside', image, '20 and 40')
    assert_one_line(call(*start, image, '--size', 0), '--size')
    for block in ('1.1', '4.0', 'last'):
        assert_one_line(call(*start, image, '--block', block), f'--block {block}',
                        'choose of 0.0, 1.0, 2.0, 3.0')
    assert_one_line(call(*start, image, '--cfg-options', 'model.backbone.arch.scan=bidirectional'),
                    'scan', "'bidirectional'", "'cross'")
    ssd = tmp_path / 'ssd.pth'
    options = '--cfg-options', 'model.backbone.arch.core=ssd'
    model = tool.cli.build_model(tool.cli.load_config(str(config), [
        'model.backbone.arch.core=ssd']))
    torch.save(dict(state_dict=model.state_dict()), ssd)
    assert_one_line(call(TOOL, config, '--checkpoint', ssd, image, *options), "core='ssd'",
                    'no SS2D')
    resnet = tmp_path / 'resnet.pth'
    model = tool.cli.build_model(tool.cli.load_config(RESNET))
    torch.save(dict(state_dict=model.state_dict()), resnet)
    assert_one_line(call(TOOL, RESNET, '--checkpoint', resnet, image), 'ResNet', 'no SS2D')
    assert_one_line(call(TOOL, config, '--checkpoint', resnet, image), resnet, 'does not fit')
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'not an image')
    assert_one_line(call(*start, bad), bad, 'corrupt')
