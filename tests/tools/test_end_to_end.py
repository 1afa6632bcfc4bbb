"""tools/bench/end_to_end.py on a CPU, with small models in the places of those it measures."""

import csv
import functools
import sys

import pytest
import torch

from vmamba_mm.errors import UserError

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv',
            scan='cross')


@pytest.fixture
def tool(monkeypatch, load_tool):
    """end_to_end with small models; call(*argv) runs its main."""
    pytest.importorskip('timm')
    pytest.importorskip('mmengine')
    end_to_end = load_tool('bench/end_to_end.py')
    make = end_to_end.make_model

    def make_small(name, output, height, width):
        if name == 'tiny_s1l8':
            from vmamba_mm.models import VMamba
            from vmamba_mm.timm import TimmVMamba
            return VMamba(ARCH) if output == 'maps' else TimmVMamba(ARCH, num_classes=10)
        if name == 'convnext_t':
            return make_peer(output)
        if name == 'swin_t':
            raise RuntimeError('this one\nfails')
        return make(name, output, height, width)

    def make_peer(output):
        import timm
        return timm.create_model('test_convnext', features_only=output == 'maps')

    def call(*argv):
        end_to_end.make_subject.cache_clear()
        monkeypatch.setattr(sys, 'argv', ['end_to_end.py', *map(str, argv)])
        end_to_end.main()

    monkeypatch.setattr(end_to_end, 'make_model', make_small)
    monkeypatch.setattr(end_to_end, 'call', call, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # put back afterwards
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the maps are small
    yield end_to_end
    torch.set_num_threads(threads)


ON_CPU = ('--device', 'cpu', '--shrink', 64, '--quick', '--dtype', 'bfloat16')


def test_all_sections(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'mambavision', None)  # an import of it fails
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    tool.call(*ON_CPU, '--models', 'tiny_s1l8', 'convnext_t', 'swin_t', 'mambavision_t',
              '--sections', *tool.SECTIONS, '--csv', tmp_path / 'a.csv', '--png',
              tmp_path / 'a.png')
    out, err = capsys.readouterr()
    ratios, anchors, medians, missing = (out.index(text) for text in (
        'Times as fast as the peer', 'measured by us on an H100', 'Medians', 'Not measured'))
    assert ratios < anchors < medians < missing
    assert 'swin_t: RuntimeError: this one fails' in out[missing:]
    assert 'mambavision_t: not installed' in out[missing:]
    assert 'time per pixel' in out
    assert 'compiled-training: ' in err

    lines = list(csv.DictReader((tmp_path / 'a.csv').open()))
    cases = {(line['model'], line['task'], line['how'], line['precision'], line['batch'],
              line['height'], line['output']) for line in lines}
    assert len(cases) == len(lines) == 4 * (3 + 10 + 6 + 2 + 2 + 3)
    for line in lines:
        fails = line['model'] in ('swin_t', 'mambavision_t') or line['how'] == 'graph'
        assert bool(line['problem']) == fails
        assert (float(line['ms']) > 0) != fails
        checked = line['model'] == 'tiny_s1l8' and not fails
        assert (0 < float(line['error']) < 6e-2) == checked
        assert (0 < float(line['grad_error']) < 0.15) == (
            checked and line['task'] == 'forward+backward')
    png = (tmp_path / 'a.png').read_bytes()
    assert png.startswith(b'\x89PNG') and len(png) > 30_000

    tool.call('--merge', tmp_path / 'a.csv', '--csv', tmp_path / 'b.csv')
    assert capsys.readouterr().out.splitlines()[1:] == out.splitlines()[2:]
    assert (tmp_path / 'b.csv').read_text() == (tmp_path / 'a.csv').read_text()
    other = (tmp_path / 'a.csv').read_text().replace(',CPU,', ',another GPU,')
    (tmp_path / 'c.csv').write_text(other.replace(',tiny_s1l8,', ',base_s1l20,'))
    with pytest.raises(UserError, match='device CPU and another GPU'):
        tool.call(*ON_CPU, '--sections', 'headline', '--merge', tmp_path / 'c.csv')


def test_vim_beside_deit(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda', None)  # an import of it fails
    tool.call(*ON_CPU, '--sections', 'vim', '--csv', tmp_path / 'a.csv', '--models', 'vim_tiny',
              'deit_t', 'plain_deit_t', 'published_vim_t', 'mamba_ssm_vim_t')
    out = capsys.readouterr().out
    head, ratio = out[out.index('Times as fast'):].splitlines()[1:3]
    assert head.split('  ')[-1] == 'as published, our scan' and 'DeiT, attention in memory' in head
    assert ratio.startswith('vim_tiny: forward+backward eager') and len(ratio.split()) == 7 + 3
    assert 'mamba_ssm_vim_t: not installed' in out
    lines = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert len(lines) == 10
    assert all(0 < float(line['error']) < 6e-2 for line in lines if line['model'] == 'vim_tiny')


@pytest.mark.parametrize(('section', 'name', 'peer'), [
    ('vssd', 'vssd_micro', 'ConvNeXt'), ('rmt', 'rmt_tiny', 'DeiT'),
    ('mila', 'mila_tiny', 'ConvNeXt'), ('ravlt', 'ravlt_tiny', 'DeiT'),
    ('vrwkv', 'vision_rwkv_tiny', 'DeiT')])
def test_beside_what_was_published(tool, tmp_path, capsys, section, name, peer):
    tool.call(*ON_CPU, '--sections', section, '--csv', tmp_path / 'a.csv', '--models', name,
              f'published_{name}')
    out = capsys.readouterr().out
    head, ratio = out[out.index('Times as fast'):].splitlines()[1:3]
    assert head.split() == ['as', 'published', peer]
    assert ratio.startswith(f'{name}: forward+backward eager autocast')
    lines = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert len(lines) == 8 and not any(line['problem'] for line in lines)
    assert all(0 < float(line['error']) < 6e-2 for line in lines if line['model'] == name)


@pytest.mark.parametrize('name', ['vssd_micro', 'rmt_tiny', 'mila_tiny', 'ravlt_tiny',
                                  'vision_rwkv_small'])
def test_what_was_published_is_ours(load_tool, name):
    pytest.importorskip('timm')
    models = load_tool('bench/end_to_end_models.py')
    torch.manual_seed(0)
    published = models.make_model(f'published_{name}', 'logits', 64, 32).double().eval()
    ours, x = published.classifier, torch.randn(2, 3, 64, 32, dtype=torch.float64)
    expected = ours(x)
    grads = torch.autograd.grad(expected.sin().sum(), list(ours.parameters()))
    found = published(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sin().sum(), list(ours.parameters())), grads,
                          strict=True):
        torch.testing.assert_close(one, other)


def test_published_mixer_is_vims(load_tool):
    pytest.importorskip('mmengine')
    vim_models = load_tool('bench/vim_models.py')
    torch.manual_seed(0)
    model = vim_models.Vim(dict(base='tiny', embed_dims=16, depth=2, image_size=48),
                           out_type='raw').double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    expected = model(x)[0]
    grads = torch.autograd.grad(expected.sin().sum(), list(model.parameters()))
    published = vim_models.publish(model)
    assert isinstance(published.blocks[1].mixer, vim_models.PublishedMixer)
    found = published(x)[0]
    torch.testing.assert_close(found, expected)
    by_name = dict(zip(dict(model.named_parameters()), grads, strict=True))
    found.sin().sum().backward()
    for name, parameter in published.named_parameters():
        torch.testing.assert_close(parameter.grad, by_name[name], msg=name)


@pytest.mark.parametrize('what', ['the output', "the parameters' gradient"])
def test_what_is_wrong_is_not_timed(tool, break_scan, tmp_path, what):
    break_scan(forward=what == 'the output')
    with pytest.raises(UserError, match=f'tiny_s1l8 is wrong.*: {what} differs'):
        tool.call(*ON_CPU, '--models', 'convnext_t', 'tiny_s1l8', '--csv', tmp_path / 'a.csv')
    lines = list(csv.DictReader((tmp_path / 'a.csv').open()))
    assert {line['model'] for line in lines} == {'convnext_t'}


def test_our_failure_is_an_error(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'make_model', lambda *args: 1 / 0)
    with pytest.raises(UserError, match='tiny_s1l8 failed'):
        tool.call(*ON_CPU, '--models', 'tiny_s1l8')
    assert 'tiny_s1l8: ZeroDivisionError' in capsys.readouterr().out


def test_graph_is_checked(tool, monkeypatch):
    """The path of CUDA graphs, with a call in the place of a replay."""
    monkeypatch.setattr(tool, 'graphed', lambda function: function)
    args = type('args', (), dict(device='cpu', dtype=torch.bfloat16, shrink=16, quick=True))
    case = tool.Case('tiny_s1l8', how='graph', batch=1, height=800, width=1280, output='maps')
    numbers = tool.measure(case, args)
    assert 0 < numbers['error'] < 6e-2 and numbers['peak_gib'] != numbers['peak_gib']


def test_anchors(tool, capsys):
    report = tool.report
    rows = {report.Case('tiny_s1l8'): dict(images_per_s=9000.0),
            report.Case('tiny_s1l8', batch=1): dict(ms=5.6),
            report.Case('small_s1l20', 'forward+backward'): dict(images_per_s=1702.0)}
    for side, batch, speed in ((224, 64, 8000.0), (1024, 4, 400.0)):
        rows[report.Case('tiny_s1l8', batch=batch, height=side, width=side)] = dict(
            images_per_s=speed)
    rows = {case: dict.fromkeys(report.NUMBERS, report.NAN) | row for case, row in rows.items()}
    report.print_anchors(rows)
    lines = capsys.readouterr().out.splitlines()[3:]
    # Per pixel 8000 / 400 * (224 / 1024)^2 = 0.957.
    assert [line.split()[-4:] for line in lines] == [
        ['9000', '2872', '5128', '7368'], ['5.6', '24.7', '9', '5.6'],
        ['400', '140', '221', '289'], ['1702', '709', '-', '-'], ['0.957', '0.92', '1.06', '1.13']]


def test_every_model_builds(tool, monkeypatch):
    monkeypatch.undo()  # the real make_model
    for name in tool.MODELS:
        if name not in ('mambavision_t', *tool.PUBLISHED):
            with torch.device('meta'):
                model = tool.make_model(name, 'logits', 224, 224)
            assert sum(p.numel() for p in model.parameters()) > 5e6
