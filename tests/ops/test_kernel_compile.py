"""Compiling kernels: NVRTC and how it is found, what a kernel takes, the disk cache."""

import hashlib
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from kernel_folder import HEADER, INNER, KINDS, SOURCE, instance, needs_nvrtc

from vmamba_mm.ops.core import compile, libraries

ARCHS = (75, 80, 86, 89, 90, 100, 120)


# --- compilation ----------------------------------------------------------------------------

@needs_nvrtc
@pytest.mark.parametrize('arch', ARCHS)
def test_compiles_for(arch, kernels_folder):
    if arch not in compile.find_nvrtc().archs:
        pytest.skip(f'NVRTC {compile.find_nvrtc().version} does not know sm_{arch}')
    binary = compile.build(KINDS, f'sm_{arch}')
    assert binary.image.startswith(b'\x7fELF') and binary.symbol.startswith('_Z5kinds')
    assert binary.param_types == ('b8[48]',)  # 44 and padding


@needs_nvrtc
def test_ptx_for_a_virtual_arch(kernels_folder):
    binary = compile.build(instance(), 'compute_80')
    assert b'.target sm_80' in binary.image and binary.image.endswith(b'\0')
    assert binary.symbol == 'add'  # extern "C": the name as it is


@needs_nvrtc
@pytest.mark.parametrize('name, text, said', [
    ('add', SOURCE.replace('blockIdx.x', 'blockIdx.x %d x'), r'add.cu\(11\): error'),
    ('ad', SOURCE, 'identifier "ad" is undefined'),
    ('add', SOURCE.replace('add.cuh', 'absent.cuh'), 'cannot open source file "absent.cuh"')])
def test_errors_come_with_the_log(name, text, said, kernels_folder):
    (kernels_folder / 'add.cu').write_text(text)
    with pytest.raises(RuntimeError, match=said):
        compile.build(instance(name), 'sm_80')
    assert not (kernels_folder / 'cache').exists()


@needs_nvrtc
def test_an_unknown_option_is_an_error(kernels_folder):
    with pytest.raises(RuntimeError, match='--nonsense'):
        compile.build(instance(options=('--nonsense',)), 'sm_80')


@needs_nvrtc
def test_a_kernel_without_parameters(kernels_folder):
    assert compile.build(instance('nothing'), 'sm_80').param_types == ()


@needs_nvrtc
@pytest.mark.parametrize('name, text, said', [
    ('add', SOURCE.replace('struct Add', 'struct alignas(64) Add'), '32 bytes, but the kernel'),
    ('add', SOURCE.replace('int n;', 'int n : 3;'), "'int n : 3' is not understood"),
    ('add', SOURCE.replace('int n;', 'short n;'), "no plain struct 'short'"),
    ('loose', SOURCE, r'takes \(float \*out, int n\), not one struct')])
def test_parameters_that_are_not_understood_raise(name, text, said, kernels_folder):
    (kernels_folder / 'add.cu').write_text(text)
    with pytest.raises(ValueError, match=said):
        compile.build(instance(name), 'sm_80')


def test_target_is_own_code_or_ptx_of_the_nearest_older_arch():
    assert compile.target(90, (75, 80, 90)) == 'sm_90'
    assert compile.target(89, (75, 80, 90)) == 'compute_80'
    assert compile.target(120, (75, 80, 90)) == 'compute_90'
    with pytest.raises(RuntimeError, match='7.5 and above, and this GPU has 7.0'):
        compile.target(70, (75, 80, 90))


# --- finding NVRTC --------------------------------------------------------------------------

def without_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, 'cuda.bindings', None)


def find_again():
    return compile.find_nvrtc.__wrapped__()


def test_without_nvrtc_the_error_says_where_it_looked(monkeypatch):
    without_bindings(monkeypatch)
    monkeypatch.setattr(libraries, 'candidates', lambda *_: iter(['/nowhere/libnvrtc.so']))
    with pytest.raises(compile.NvrtcNotFound, match='nvidia.*torch/lib.*CUDA_HOME.*/nowhere/libnv'):
        find_again()


@needs_nvrtc
def test_nvrtc_of_another_cuda_is_refused(monkeypatch):
    version = compile.find_nvrtc().version
    monkeypatch.setattr(torch.version, 'cuda', f'{version[0] + 1}.0')
    with pytest.raises(compile.NvrtcNotFound, match=rf'\S* \(CUDA {version[0]}\)'):
        find_again()


@needs_nvrtc
def test_without_cuda_bindings_the_same_is_compiled(monkeypatch, kernels_folder):
    found = compile.find_nvrtc()
    without_bindings(monkeypatch)
    other = find_again()
    assert other.version == found.version and other.archs == found.archs
    files = compile.read_sources('add.cu')
    binaries = [nvrtc.compile(files, 'kinds<double, 7>', ['--gpu-architecture=sm_80', '-DSCALE=1'])
                for nvrtc in (found, other)]
    assert binaries[0] == binaries[1]
    with pytest.raises(RuntimeError, match='NVRTC_ERROR_COMPILATION'):
        other.compile(files, 'absent', ['--gpu-architecture=sm_80', '-DSCALE=1'])


@needs_nvrtc
def test_nvrtc_is_found_before_torch_has_loaded_it(monkeypatch):
    monkeypatch.setattr(libraries, 'loaded_libraries', lambda: [])
    without_bindings(monkeypatch)
    assert find_again().version == compile.find_nvrtc().version
    assert not any('alt' in path for path in libraries.candidates('nvrtc', [13]))


@needs_nvrtc
def test_nvrtc_finds_its_builtins_in_a_process_without_torch():
    """pip's folders are not on the loader's path; torch happens to load the file, we must too."""
    code = ('import sys, types; sys.modules["torch"] = t = types.ModuleType("torch")\n'
            't.device = None\n'
            'import vmamba_mm; ops = types.ModuleType("vmamba_mm.ops")\n'
            'ops.__path__ = [vmamba_mm.__path__[0] + "/ops"]; sys.modules["vmamba_mm.ops"] = ops\n'
            'from vmamba_mm.ops.core import compile\n'
            'n = compile.Nvrtc(compile.CtypesNvrtc(sys.argv[1]))\n'
            'print(n.compile({"k.cu": b"__global__ void k() {}"}, "k", []).symbol)')
    path = next(libraries.candidates('nvrtc', [compile.find_nvrtc().version[0]]))
    done = subprocess.run([sys.executable, '-c', code, path], capture_output=True, text=True)
    assert done.stdout.strip() == '_Z1kv', done.stderr


@pytest.mark.parametrize('windows, names, loader', [
    (False, ['libnvrtc.so.13', 'libnvrtc-1a2b.so.13.0'], 'libnvrtc.so.13'),
    (True, ['nvrtc64_130_0.dll'], 'nvrtc64_130_0.dll')], ids=['linux', 'windows'])
def test_names_of_libraries(windows, names, loader, monkeypatch, tmp_path):
    """As pip, conda and NVIDIA's installer lay them out; not what only looks alike."""
    monkeypatch.setattr(libraries, 'WINDOWS', windows)
    monkeypatch.setattr(libraries, 'loaded_libraries', lambda: [])
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'site')])
    monkeypatch.setattr(sys, 'prefix', str(tmp_path / 'conda'))
    monkeypatch.setenv('CUDA_PATH', str(tmp_path / 'cuda'))
    pip, conda, cuda = (('nvidia/cu13/bin/x86_64', 'Library/bin', 'bin/x64') if windows else
                        ('nvidia/cuda_nvrtc/lib', 'lib', 'lib64'))
    folders = [tmp_path / 'site' / pip, tmp_path / 'conda' / conda, tmp_path / 'cuda' / cuda]
    for place in folders:
        place.mkdir(parents=True)
        for name in (*names, 'nvrtc64_130_0.alt.dll', 'nvrtc-builtins64_130.dll',
                     'libnvrtc-builtins.so.13.0', 'libnvrtc.alt.so.13', 'libcudart.so.13'):
            (place / name).touch()
    found = list(libraries.candidates('nvrtc', [13]))
    own = [path for path in found if path.startswith(str(tmp_path))]
    assert own == [str(place / name) for place in folders for name in sorted(names)]
    assert loader in found


# --- cache ----------------------------------------------------------------------------------

@needs_nvrtc
def test_a_second_process_does_not_compile(kernels_folder, compilations, monkeypatch):
    first = compile.build(KINDS, 'sm_80')
    with compile.override_cache():
        assert compile.build(KINDS, 'sm_80') == first
    assert len(compilations) == 1


@needs_nvrtc
@pytest.mark.parametrize('damage', [
    lambda data: b'', lambda data: data[:20], lambda data: data[:-1], lambda data: data + b'x',
    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], lambda data: bytes(len(data))],
    ids=['empty', 'header', 'truncated', 'longer', 'bit', 'zeros'])
def test_a_damaged_entry_is_compiled_again(damage, kernels_folder, compilations):
    first = compile.build(KINDS, 'sm_80')
    entry, = (kernels_folder / 'cache').iterdir()
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    with compile.override_cache():
        assert compile.build(KINDS, 'sm_80') == first
    assert len(compilations) == 2 and entry.read_bytes() == good


@needs_nvrtc
def test_an_entry_under_another_name_is_damaged(kernels_folder, compilations):
    compile.build(instance(scale='2.f'), 'sm_80')
    entry, = (kernels_folder / 'cache').iterdir()
    compile.build(instance(scale='3.f'), 'sm_80')
    other, = set((kernels_folder / 'cache').iterdir()) - {entry}
    other.write_bytes(entry.read_bytes())
    with compile.override_cache():
        compile.build(instance(scale='3.f'), 'sm_80')
    assert len(compilations) == 3


@needs_nvrtc
def test_each_ingredient_compiles_anew(kernels_folder, compilations, monkeypatch):
    compile.build(instance(), 'sm_80')
    compile.build(instance('nothing'), 'sm_80')
    compile.build(instance(scale='2.f'), 'sm_80')
    compile.build(instance(options=('--use_fast_math',)), 'sm_80')
    compile.build(instance(), 'sm_90')
    compile.build(instance(), 'compute_90')
    for name, text in (('add.cu', SOURCE), ('add.cuh', HEADER), ('plus.cuh', INNER)):
        (kernels_folder / name).write_text(text + '\n')
        compile.build(instance(), 'sm_80')
    monkeypatch.setattr(compile.find_nvrtc(), 'version', (99, 0))
    compile.build(instance(), 'sm_80')
    assert len(compilations) == len(list((kernels_folder / 'cache').iterdir())) == 10
    compile.build(instance(), 'sm_80')
    assert len(compilations) == 10


@needs_nvrtc
def test_threads_compile_once(kernels_folder, compilations):
    results = []
    threads = [threading.Thread(target=lambda: results.append(compile.build(KINDS, 'sm_80')))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == len(compilations) == 1


@needs_nvrtc
def test_several_processes_at_once(kernels_folder):
    code = ('import hashlib, sys\n'
            'from pathlib import Path\n'
            'from vmamba_mm.ops.core import compile\n'
            'i = compile.Instance("add.cu", "kinds<double, 7>", defines=(("SCALE", "1.f"),))\n'
            'folder = Path(sys.argv[1])\n'
            'with compile.override_cache(folder / "cache", folder):\n'
            '    print(hashlib.sha256(compile.build(i, "sm_80").image).hexdigest())')
    running = [subprocess.Popen([sys.executable, '-W', 'error', '-c', code, str(kernels_folder)],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    done = [process.communicate() for process in running]
    image = compile.build(KINDS, 'sm_80').image
    assert {out.strip() for out, _ in done} == {hashlib.sha256(image).hexdigest()}, done
    assert len(list((kernels_folder / 'cache').iterdir())) == 1


@needs_nvrtc
def test_without_a_writable_folder_it_works_and_warns_once(kernels_folder):
    with compile.override_cache(kernels_folder / 'add.cu' / 'cache'):
        with pytest.warns(RuntimeWarning, match='VMAMBA_MM_CACHE_DIR'):
            compile.build(KINDS, 'sm_80')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            compile.build(instance(), 'sm_80')


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.delenv('VMAMBA_MM_CACHE_DIR', raising=False)
    assert compile.cache_dir() == tmp_path / '.cache/vmamba_mm'
    monkeypatch.setenv('XDG_CACHE_HOME', '/x')
    assert str(compile.cache_dir()) == '/x/vmamba_mm'
    monkeypatch.setenv('VMAMBA_MM_CACHE_DIR', '~/own')
    assert compile.cache_dir() == tmp_path / 'own'
