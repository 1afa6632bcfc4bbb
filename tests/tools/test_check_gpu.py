"""tools/check_gpu.py, as far as a machine without a GPU can tell: its cases are for every kernel,
and what it makes of the tools' logs. tests/ops/test_gpu_cases.py runs cases."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vmamba_mm.ops.core import gemm
from vmamba_mm.paths import KERNELS

TOOLS = Path(__file__).parents[2] / 'tools'
FILES = {path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob('*.cu')}
FAKE = """#!{python}
import sys
tool = sys.argv[sys.argv.index('--tool') + 1]
part = int(sys.argv[sys.argv.index('--part') + 1])
print('no kernel: ssd, (1): backend=None does not take these inputs: too old')
print('launched: ' + ('' if tool == 'racecheck' else '{files}'))
print('all cases ran')
sys.exit(99 if tool == 'initcheck' and part else 0)
"""


@pytest.fixture(autouse=True)
def check_gpu(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import check_gpu
    return check_gpu


@pytest.fixture
def cases(check_gpu):
    import _gpu_cases
    return _gpu_cases.all_cases()


# --- the cases ------------------------------------------------------------------------------------

def test_every_kernel_has_a_case(cases):
    """Without those of models, which need mmengine."""
    launched = {file for case in cases if not case.name.startswith('model') for file in
                case.launches}
    assert FILES - launched == set(), 'give these a case in tools/_gpu_cases.py'
    assert launched - FILES == set(), 'there are no such files'
    assert all(case.launches for case in cases if 'fp32' not in case.name)


@pytest.mark.parametrize('start', ['wkv', 'bi_wkv', 'nc_ssd', 'nc_ssd_mixer', 'masa', 'masa_mixer',
                                   'shift_mix', 'gates', 'spatial_mixer', 'channel_mixer', 'ssd',
                                   'selective_scan', 'causal_conv', 'mamba_inner', 'ss2d_scan',
                                   'ss2d_scan_norm', 'model'])
def test_ops_in_half_and_single_precision_have_cases(start, cases):
    assert len([case for case in cases if case.name.startswith(f'{start}, ')]) >= 2


def test_names_choose(check_gpu, cases):
    assert len({case.name for case in cases}) == len(cases)
    assert check_gpu.choose(cases, [''], []) == cases
    chosen = check_gpu.choose(cases, ['wkv', 'masa'], ['bi_wkv', 'lepe'])
    assert {case.name.split(',')[0] for case in chosen} == {'wkv', 'masa'}
    with pytest.raises(check_gpu.UserError, match=r"no case has one of \['msa'\] in its name"):
        check_gpu.choose(cases, ['msa'], [])


def test_list(check_gpu, cases, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['check_gpu.py', '--list', '--leave-out', 'model'])
    check_gpu.main()
    names = capsys.readouterr().out.splitlines()
    assert names == [case.name for case in cases if 'model' not in case.name]


# --- the tools ------------------------------------------------------------------------------------

def test_sanitizer_is_missing(check_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(check_gpu, 'Path', lambda *parts: tmp_path.joinpath('absent', *parts[1:]))
    with pytest.raises(check_gpu.UserError, match='compute-sanitizer was not found'):
        check_gpu.find_sanitizer()


@pytest.mark.parametrize('code, log, problem', [
    (0, 'launched: a.cu b.cu\nall cases ran', None),
    (99, '========= ERROR SUMMARY: 3 errors', 'ERROR SUMMARY: 3 errors'),
    (0, '========= Target application returned', 'exit code 0'),
    (99, '========= Error: Race reported between a and b\n========= RACECHECK SUMMARY: 2 hazards',
     'Error: Race reported between a and b; RACECHECK SUMMARY: 2 hazards'),
    (99, '1 s: a\n========= Internal Sanitizer Error: no\n========= \n====== RACECHECK SUMMARY: 1',
     'Internal Sanitizer Error: no; RACECHECK SUMMARY: 1'),
    (1, 'RuntimeError: no', 'the cases failed with exit code 1: RuntimeError: no')])
def test_what_a_log_says(check_gpu, code, log, problem):
    assert check_gpu.find_problem(log, code) == problem


def test_products_of_initcheck(check_gpu):
    """They stand for cuBLAS; here by hand, as they are registered for CUDA only."""
    registered = {}

    class Library:
        def impl(self, name, function, key):
            registered[name] = function

    class Torch:
        cat = torch.cat

        class library:  # noqa: N801
            Library = staticmethod(lambda *args: Library())

        @staticmethod
        def as_tensor(memory, device):
            """A tensor of the CPU, which has no such interface."""
            given = memory.__cuda_array_interface__
            size = given['shape'][0]
            words = {'<i2': ctypes.c_int16, '<i4': ctypes.c_int32}[given['typestr']] * size
            return torch.frombuffer(words.from_address(given['data'][0]),
                                    dtype=getattr(torch, f'int{8 * ctypes.sizeof(words) // size}'))

    blas = SimpleNamespace(Product=gemm.Product)
    check_gpu.write_products_plainly(Torch, blas)
    a, b, bias = torch.randn(2, 7, 5), torch.randn(2, 5, 3), torch.randn(3)
    out = torch.empty(7, 3)
    torch.testing.assert_close(registered['bmm'](a, b), a @ b)
    torch.testing.assert_close(registered['mm.out'](a[0], b[0], out=out), a[0] @ b[0])
    torch.testing.assert_close(registered['addmm'](bias, a[0], b[0], beta=2),
                               torch.addmm(bias, a[0], b[0], beta=2))

    a, b, bias = (t.bfloat16() for t in (a[0].T.contiguous(), b[0].T.contiguous(), bias))
    blas.product(0, torch.bfloat16, torch.float32, 7, 3, 5, left_t=True, right_t=True, bias=True
                 ).run(a.data_ptr(), b.data_ptr(), out.data_ptr(), 0, bias.data_ptr())
    expected = a.double().T @ b.double().T + bias
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)  # rounded before


def test_what_was_never_launched(check_gpu):
    cases = [SimpleNamespace(name='one', launches=('a.cu', 'b.cu')),
             SimpleNamespace(name='old, (2)', launches=('c.cu',))]
    logs = ['launched: a.cu\nall cases ran', 'launched: b.cu d.cu\nall cases ran']
    assert check_gpu.find_missing(cases, logs) == ['c.cu']
    logs[1] += "\nno kernel: old, (2): backend='cuda' does not take these inputs: too old"
    assert check_gpu.find_missing(cases, logs) == []
    assert check_gpu.find_missing(cases, logs[1:]) == ['a.cu']
    assert check_gpu.absences(logs[1]) == [
        ('old, (2)', "backend='cuda' does not take these inputs: too old")]


def test_all_tools_and_parts(check_gpu, monkeypatch, tmp_path, capsys):
    """By a sanitizer that is made up, of which one tool finds something and one runs nothing."""
    sanitizer = tmp_path / 'sanitizer'
    sanitizer.write_text(FAKE.format(python=sys.executable, files=' '.join(sorted(FILES))))
    sanitizer.chmod(0o755)
    monkeypatch.setattr(check_gpu, 'find_sanitizer', lambda: str(sanitizer))
    monkeypatch.setattr(check_gpu, 'LOGS', tmp_path / 'logs')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(sys, 'argv', ['check_gpu.py', '--tools', 'memcheck', '--jobs', '3'])
    check_gpu.main()
    said = capsys.readouterr().out
    assert said.count('passed') == 3 and 'cases under memcheck: clean' in said
    assert 'ssd, (1) has no kernel here' in said
    assert len([*(tmp_path / 'logs').iterdir()]) == 3
    monkeypatch.setattr(sys, 'argv', ['check_gpu.py', '--jobs', '6'])
    with pytest.raises(check_gpu.UserError, match='initcheck, racecheck found something'):
        check_gpu.main()
    said = capsys.readouterr().out
    assert 'racecheck  FAILED: never launched: causal_conv/causal_conv_bwd.cu' in said
    assert 'initcheck  2 of 2: FAILED: exit code 99' in said
