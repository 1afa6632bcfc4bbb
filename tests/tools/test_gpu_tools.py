"""The tools for a GPU machine, as far as one without a GPU can tell."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmamba_mm.layers import LayerNorm
from vmamba_mm.ops.core import launch

TOOLS = Path(__file__).parents[2] / 'tools'
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.syspath_prepend(TOOLS / 'bench')


def call(main, monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, argv)])
    main()


def test_floors_of_an_h100():
    """The numbers that kernels/README.md and the speed anchors give for stage 1."""
    from floors import floors

    gpu = {'multiprocessors': 132, 'MHz': 1980, 'copy': 3.01e9}
    found, size = floors(128 * 4 * 96 * 56 * 56, 1, False, gpu)
    assert size == 2 * 2 * 128 * 96 * 56 * 56
    assert found['bytes'] == pytest.approx(0.0513, rel=0.01)
    assert found['special'] == pytest.approx(0.11, rel=0.02)
    both, size_of_both = floors(128 * 4 * 96 * 56 * 56, 1, True, gpu)
    assert size_of_both == 2.5 * size
    assert both['special'] == pytest.approx(found['special'] * 7 / 3)
    vanilla, _ = floors(128 * 4 * 192 * 56 * 56, 16, False, gpu)
    assert vanilla['special'] == pytest.approx(1.33, rel=0.01)


@pytest.mark.parametrize('state', [1, 3])
def test_materialised_pipeline_is_the_op(state):
    import materialised

    from vmamba_mm.ops import ss2d_scan_norm
    from vmamba_mm.testing import assert_close, ss2d_scan_inputs, with_grads

    inputs = ss2d_scan_inputs(5, 6, 4, 7, state=state)
    inputs |= dict(norm_weight=torch.rand(6), norm_bias=torch.rand(6))
    y, grads = with_grads(ss2d_scan_norm, inputs)
    y_four, grads_four = with_grads(materialised.ss2d_scan_norm, inputs)
    assert_close(y_four, y, 1e-5)
    for name, grad in grads.items():
        assert_close(grads_four[name], grad, 1e-5, name)


def test_pipeline_of_a_mixer_is_the_op():
    import scan1d

    from vmamba_mm.ops import mamba_inner
    from vmamba_mm.testing import assert_close, mamba_inner_inputs, with_grads

    inputs = mamba_inner_inputs(2, 2, 6, 9, scan1d.STATE, 3)
    y, grads = with_grads(mamba_inner, inputs)
    port, port_grads = with_grads(lambda **given: scan1d.plain_mixer(given), inputs)
    assert_close(port, y, 1e-5)
    for name, grad in grads.items():
        assert_close(port_grads[name], grad, 1e-5, name)


def test_floors_of_state_space_duality():
    """What docs/kernels-journal.md says of an H200, whose copy moves 4.1 TB/s."""
    import ssd

    floors = [row.bytes / 4.1e9 for row in ssd.ROWS]
    assert floors[:6] == pytest.approx([0.050, 0.010, 0.005, 0.081, 0.029, 0.084], abs=2e-3)


def test_published_mixer_of_u_mamba(capsys, monkeypatch):
    """What stands beside the network, and a check that finds what is wrong."""
    import u_mamba

    arch = dict(variant='enc', features_per_stage=(4, 5, 14), kernel_sizes=((3, 3),) * 3,
                strides=((1, 1), (2, 1), (1, 2)), n_conv_per_stage=(1,) * 3,
                n_conv_per_stage_decoder=(1, 1), input_size=(4, 6))
    row = u_mamba.Row('', arch, 3, 2, 2, (4, 6))
    model = u_mamba.make(row, 'cpu').double()
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64)
    expected = model(x)
    shapes = u_mamba.map_shapes(model, 2, row.size)
    assert shapes == [(2, 4, 4, 6), (2, 14, 2, 3)]
    for layer, shape in zip(u_mamba.mamba_layers(model), shapes, strict=True):
        assert u_mamba.is_right(layer.float(), shape)
    with monkeypatch.context() as patch:
        published = u_mamba.published_direction
        patch.setattr(u_mamba, 'published_direction', lambda *args: 1.01 * published(*args))
        is_right = u_mamba.is_right(layer, shape)
    assert not is_right and 'WRONG at (2, 14, 2, 3): y' in capsys.readouterr().out
    for ours, theirs in zip(expected, u_mamba.publish(model).double()(x), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    u_mamba.step_of(model.float(), row, 'cpu')()
    u_mamba.layers_step(model, row, 'cpu')()


@without_gpu
@pytest.mark.parametrize('bench, row', [('ss2d_gpu', 'stage 9'), ('scan1d', 'b3'), ('ssd', 'b3'),
                                         ('eight_routes', 'stage 9'), ('u_mamba', 'PET')])
def test_bench_without_a_gpu(monkeypatch, bench, row):
    bench = importlib.import_module(bench)
    with pytest.raises(SystemExit, match='finds no GPU'):
        call(bench.main, monkeypatch)
    with pytest.raises(SystemExit):
        call(bench.main, monkeypatch, '--rows', row)


@without_gpu
def test_segmamba_without_a_gpu(monkeypatch):
    with pytest.raises(SystemExit, match='finds none'):
        call(importlib.import_module('segmamba').main, monkeypatch)


def test_segmamba_is_compared_with_the_public_order():
    """Order by order, as the public code has it, is the mixer; in fp32 on a CPU."""
    import torch
    from segmamba import PublishedMixer, publish

    from vmamba_mm.layers import TriMambaMixer

    torch.manual_seed(0)
    mixers, x = torch.nn.ModuleList([TriMambaMixer(6, d_state=3)]), torch.randn(2, 12, 6)
    expected = mixers[0](x, 4)
    found = publish(mixers)[0]
    assert type(found) is PublishedMixer
    torch.testing.assert_close(found(x, 4), expected)


@without_gpu
def test_pointmamba_without_a_gpu(monkeypatch):
    with pytest.raises(SystemExit, match='finds none'):
        call(importlib.import_module('pointmamba').main, monkeypatch)


def test_pointmamba_is_compared_with_the_published_form(capsys):
    """In fp32 on a CPU, with drop path; another model is found."""
    import pointmamba
    import torch

    arch = dict(embed_dims=12, depth=3, num_groups=10, group_size=6, order='hilbert', d_state=3)
    model, points = pointmamba.make(arch, 0.3).train(), pointmamba.make_clouds(3, 40, 'cpu')
    for ours, theirs in zip(*(pointmamba.results_of(of, points, half=False)
                              for of in (model, pointmamba.publish(model))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    assert pointmamba.is_right(model=model, points=points)
    with pytest.MonkeyPatch.context() as patch:
        direction = pointmamba.published_direction
        patch.setattr(pointmamba, 'published_direction', lambda *args: 4 * direction(*args))
        assert not pointmamba.is_right(model=model, points=points)
    assert 'gradients: error' in capsys.readouterr().out


def test_loss_curve(monkeypatch, tmp_path, capsys):
    import loss_curve

    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    with pytest.raises(SystemExit, match='the loss does not fall'):
        call(loss_curve.main, monkeypatch, '--backend', 'reference', '--size', 32, '--steps', 2,
             '--batch', 4, '--out', tmp_path)
    assert 'plain, fp32' in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / 'loss_curve.csv').open()))
    assert len(rows) == 3 and len(rows[0]) == 5
    assert float(rows[1][1]) == pytest.approx(float(rows[1][2]), rel=1e-3)
    assert (tmp_path / 'loss_curve.png').stat().st_size > 10_000
    with pytest.raises(SystemExit, match='no two folders'):
        call(loss_curve.main, monkeypatch, '--backend', 'chunked', '--images', tmp_path)


def test_plain_pytorch_of_the_loss_curve_has_no_kernel(monkeypatch):
    import loss_curve

    def load(*args):
        raise RuntimeError('a kernel')

    monkeypatch.setattr('vmamba_mm.ops.core.backends.KERNEL_DEVICES', ('cpu',))
    monkeypatch.setattr('vmamba_mm.ops.scan_kernels.cuda.why_not',
                        lambda *args: None)  # as on a GPU
    monkeypatch.setattr('vmamba_mm.ops.core.launch.load', load)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: SimpleNamespace(
        multi_processor_count=4, shared_memory_per_multiprocessor=2**17,
        shared_memory_per_block_optin=2**16))
    launch.forget()
    norm, x = LayerNorm(8), torch.randn(2, 3, 8)
    with loss_curve.only('cuda'), pytest.raises(RuntimeError, match='a kernel'):
        norm(x)
    with loss_curve.only('chunked'):
        torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (8,)))
