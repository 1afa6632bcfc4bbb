"""tools/check_kernels.py on kernels that are known to spill, to use a stack, or to do neither."""

import json
import sys
from pathlib import Path

import pytest

from vmamba_mm.ops.core import compile, instances

SOURCE = r'''
struct Params { float *x; };
struct ParamsOfStack { float *x; int k; };

extern "C" __global__ void good(Params p) {
    float *const x = p.x;
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[63 - threadIdx.x];
}

extern "C" __global__ void stack(ParamsOfStack p) {
    float *const x = p.x;
    const int k = p.k;
    float a[100];
    for (int i = 0; i < 100; i++) a[i] = x[i];
    a[k] = 3;
    float s = 0;
    for (int i = 0; i < k; i++) s += a[(i * k) % 100];
    x[0] = s;
}

extern "C" __global__ void spill(Params p) {
    float *const x = p.x;
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; i++) a[i] = x[i * 32];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) x[i * 32] = a[i] * a[(i + 7) % 64];
}
'''


def has_nvrtc():
    try:
        return bool(compile.find_nvrtc())
    except compile.NvrtcNotFound:
        return False


pytestmark = pytest.mark.skipif(not has_nvrtc(), reason='this torch came without NVRTC')


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the tool on a table of kernels; the budget is in a file of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools')
    import check_kernels

    source = tmp_path / 'test.cu'
    source.write_text(SOURCE)
    monkeypatch.setattr(check_kernels, 'BUDGET', tmp_path / 'resources.json')
    (tmp_path / 'resources.json').write_text('{"nvrtc": "13.0", "kernels": {}}')

    def run(*kernels, args=()):
        table = {compile.Instance(str(source), name, options=options, only=only): lowest
                 for name, options, lowest, only in ((*kernel, 0)[:4] for kernel in kernels)}
        monkeypatch.setattr(instances, 'INSTANCES', table)
        monkeypatch.setattr(sys, 'argv', ['check_kernels.py', *args])
        monkeypatch.setattr(check_kernels, 'ARCHS', (80, 90))
        check_kernels.main()
        return json.loads((tmp_path / 'resources.json').read_text())['kernels']

    run.error = check_kernels.UserError
    run.budget = tmp_path / 'resources.json'
    with compile.override_cache(tmp_path / 'cache'):
        yield run


GOOD = ('good', (), 75)
STACK = ('stack', (), 75)
SPILL = ('spill', ('--maxrregcount=24',), 75)


def test_an_empty_table_passes(check, capsys):
    check()
    assert 'no kernels yet' in capsys.readouterr().out


def test_update_then_check(check, capsys):
    with pytest.raises(check.error):  # not in the budget yet
        check(GOOD)
    written = check(GOOD, ('stack', (), 90), args=['--update'])
    assert set(written['test.cu: good']) == {'sm_80', 'sm_90'}
    assert written['test.cu: good']['sm_80']['shared'] == 256
    assert written['test.cu: stack']['sm_90']['stack'] == 400
    assert set(written['test.cu: stack']) == {'sm_90'}
    assert check(GOOD, ('stack', (), 90)) == written
    with pytest.raises(check.error):  # a kernel that is gone
        check(GOOD)
    assert 'kernels that are gone: test.cu: stack' in capsys.readouterr().out


def test_a_kernel_of_one_generation_is_compiled_for_that_alone(check):
    assert set(check((*GOOD, 90), args=['--update'])['test.cu: good']) == {'sm_90'}


@pytest.mark.parametrize('what', ['registers', 'stack'])
def test_more_than_the_budget_fails(what, check, capsys):
    check(STACK, args=['--update'])
    recorded = json.loads(check.budget.read_text())
    entry = recorded['kernels']['test.cu: stack']['sm_90']
    used = entry[what]
    if what == 'registers':  # as they are handed out, by eights
        entry[what] = (used - 1) // 8 * 8 + 1
        check.budget.write_text(json.dumps(recorded))
        check(STACK)
        used = (used - 1) // 8 * 8 + 1
    entry[what] = used - 1
    check.budget.write_text(json.dumps(recorded))
    with pytest.raises(check.error):
        check(STACK)
    assert f'sm_90: {what} ' in capsys.readouterr().out


def test_a_spill_fails_even_on_update(check, capsys):
    with pytest.raises(check.error):
        check(SPILL, args=['--update'])
    assert 'bytes of spill stores and loads' in capsys.readouterr().out


def test_a_compile_error_is_reported_and_leaves_the_budget(check, capsys):
    before = check.budget.read_text()
    with pytest.raises(check.error):
        check(GOOD, ('absent', (), 75), args=['--update'])
    assert 'identifier "absent" is undefined' in capsys.readouterr().out
    assert check.budget.read_text() == before
