"""Cases of tools/check_gpu.py on an emulated GPU: they run, and launch the kernels they are for."""

from pathlib import Path

import emulated_cuda
import pytest
import torch

from vmamba_mm.ops.core import launch

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture(params=['sm_90'])
def device(request):
    return request.param


# One of each op whose kernels no other folder's have, and the smallest of them.
@pytest.mark.parametrize('name', [
    'ssd, (2, 300, 3, 64, 1, 128), spans of 1', 'wkv, L = 61, 2 warps',
    'bi_wkv, official, L = 61, None warps', 'nc_ssd_mixer, float32',
    'masa, whole, (1, 3, 6, 1, 16)', 'masa_mixer, lepe, fp32', 'rmt_block, half',
    'shift_mix, heads, two pixels',
    'gates, (2, 3, 5, 24)', 'spatial_mixer, paper', 'channel_mixer, fp32', 'causal_conv, 3 taps',
    'depthwise convolutions, fp32', 'MLPs, fp32',
    'first half of an MLP, Shape(wide=1, tiles=2, stages=3)', 'batch norm', 'stem'])
def test_a_case_launches_what_it_names(name, place, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import _gpu_cases

    case, = (case for case in _gpu_cases.all_cases() if case.name == name)
    launched, bind = set(), emulated_cuda.Kernel.bind

    def recorded(self, *args, **fields):
        launched.add(self.instance.source)
        return bind(self, *args, **fields)

    monkeypatch.setattr(emulated_cuda.Kernel, 'bind', recorded)
    torch.manual_seed(0)
    launch.forget()
    case.run(place)
    assert set(case.launches) - launched == set()
