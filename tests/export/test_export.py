"""Files of other runtimes: written, run and compared with the model."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from specs import SPECS
from torch.utils.cpp_extension import include_paths, library_paths

from vmamba_mm.errors import UserError
from vmamba_mm.integrations.export import TARGETS, export_model
from vmamba_mm.integrations.export.native import LIBRARY
from vmamba_mm.integrations.export.targets import count_nodes
from vmamba_mm.testing import assert_close

HERE = Path(__file__).parent
#: A family, its small arch, the size of images, and whether any size goes.
MODELS = [('vmamba', None, (40, 56), True), ('vssd', None, (64, 96), True),
          ('rmt', None, (64, 64), False), ('vision_rwkv', None, (32, 48), False),
          ('vim', 'middle', (16, 16), False), ('efficientvim', None, (64, 64), False)]


def small(family, arch=None, **kwargs):
    spec = SPECS[family]
    return spec.random_model(spec.archs[arch] if arch else spec.first, **kwargs)


@pytest.mark.parametrize('family, arch, size, is_dynamic', MODELS, ids=[m[0] for m in MODELS])
def test_onnx(family, arch, size, is_dynamic, tmp_path):
    pytest.importorskip('onnxruntime')
    file = tmp_path / 'model.onnx'
    report = export_model(small(family, arch), 'onnx', file, size=size, is_dynamic=is_dynamic)
    assert report.is_right, report.lines()
    assert len(report.errors) == (4 if is_dynamic else 2)
    assert sum(count_nodes(file).values()) == report.nodes  # and nothing beside the standard


def test_openvino(tmp_path):
    pytest.importorskip('openvino')
    report = export_model(small('vmamba'), 'openvino', tmp_path / 'model.xml', size=(40, 56),
                          is_dynamic=True)
    assert report.is_right, report.lines()


@pytest.mark.skipif(not shutil.which('g++'), reason='AOTInductor and its program need g++')
def test_pt2_runs_without_python(tmp_path):
    model, file = small('vmamba', out_indices=(3,)), tmp_path / 'model.pt2'
    report = export_model(model, 'pt2', file, size=(40, 56))
    assert report.is_right, report.lines()
    program, output = tmp_path / 'run_package', tmp_path / 'output'
    libraries = library_paths()
    subprocess.run(
        ['g++', '-std=c++20', '-O0', str(HERE / 'run_package.cpp'), '-o', str(program),
         *(f'-I{path}' for path in include_paths()),
         f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
         *(f'-L{path}' for path in libraries), *(f'-Wl,-rpath,{path}' for path in libraries),
         '-ltorch', '-ltorch_cpu', '-lc10', '-ldl'], check=True)
    subprocess.run([str(program), str(file), str(file.parent / LIBRARY), '1', '3', '40', '56',
                    str(output)], check=True)
    image = (torch.arange(3 * 40 * 56) / (3 * 40 * 56)).view(1, 3, 40, 56)
    with torch.no_grad():
        expected = model(image)[0]
    found = torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.float32)
    assert_close(found.view(expected.shape), expected, 1e-5)


# --- what cannot be -------------------------------------------------------------------------------

def test_wrong_arguments(tmp_path):
    model = small('vmamba')
    for message, arguments in (
            ('--to coreml does not exist; choose one of onnx', ('coreml', 'a.onnx')),
            ('ends with .onnx, got .*a.pt2', ('onnx', tmp_path / 'a.pt2')),
            ('the folder of .* does not exist', ('onnx', tmp_path / 'none' / 'a.onnx'))):
        with pytest.raises(UserError, match=message):
            export_model(model, *arguments)
    with pytest.raises(UserError, match='--dtype int4 does not exist'):
        export_model(model, 'onnx', tmp_path / 'a.onnx', dtype='int4')


def test_missing_runtime(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: None if name == 'torch_tensorrt' else find(name))
    with pytest.raises(UserError, match='needs torch_tensorrt: pip install torch-tensorrt.*'
                       'or choose --to .*pt2'):
        export_model(small('vmamba'), 'tensorrt', tmp_path / 'a.ep')


def test_size_too_small(tmp_path):
    with pytest.raises(UserError, match=r'does not take images of 0 x 5 pixels, choose another'):
        export_model(small('vmamba'), 'onnx', tmp_path / 'a.onnx', size=(0, 5))


def test_clips(tmp_path):
    with pytest.raises(UserError, match='takes clips, and export.py exports models of single'):
        export_model(small('videomamba'), 'onnx', tmp_path / 'a.onnx')


def test_every_target_says_how_it_comes():
    for name, target in TARGETS.items():
        assert target.install or not target.modules, name
