"""Imports only go down: ops <- layers <- models <- heads <- configs, tools, tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vmamba_mm

PACKAGE = Path(vmamba_mm.__file__).parent
MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
#: The floors of the package from the bottom up: a folder or module -> what it may import besides
#: the standard library, its own floor, the floors below and modules of the ground floor.
FLOORS = {
    'ops': ('torch', 'triton', 'cuda'),  # torch brings the two others, or ops do without
    'layers': ('torch',),
    'families': (),
    'checkpoints': ('torch', 'filelock', 'numpy', 'safetensors'),
    'models': ('torch', 'mmengine'),
    'heads': ('torch', 'mmengine', 'mmpretrain', 'timm', 'tokenizers'),
    'mm': ('torch', 'numpy', 'matplotlib', 'cv2', 'PIL', 'av', 'mmengine', 'mmcv', 'mmpretrain',
           'mmdet', 'mmseg', 'monai', 'diffusers', 'torch_fidelity', 'h5py'),
    'integrations': ('torch', 'yaml', 'timm', 'mmpretrain', 'nnunetv2', 'diffusers', 'spandrel',
                     'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'openvino', 'torch_tensorrt'),
}
#: The ground floor: modules that any other may import, and what they import themselves.
GROUND = {
    '__init__.py': (), 'errors.py': (), 'atomic.py': (), 'paths.py': (), 'config.py': (),
    'registry.py': ('mmengine',),
    'zoo.py': ('yaml', 'vmamba_mm.errors', 'vmamba_mm.paths'),
    'testing.py': ('torch', 'vmamba_mm.ops'), 'testing_language.py': ('torch',),
    # Names that users import; they only pass on what is in integrations.
    'timm.py': ('vmamba_mm.integrations',), 'mmpretrain.py': ('vmamba_mm.integrations',),
    'dropin.py': ('vmamba_mm.integrations',), 'nnunet.py': ('vmamba_mm.integrations',),
    'diffusers.py': ('vmamba_mm.integrations',),
    'spandrel.py': ('vmamba_mm.integrations',),
}
#: What is below a floor in the list and yet not below it in the house.
NOT_BELOW = {'families': ('ops', 'layers'), 'checkpoints': ('ops', 'layers'),
             'layers': ('registry', 'zoo'), 'ops': ('registry', 'testing', 'zoo')}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            if node.module == 'vmamba_mm':  # its modules, such as zoo
                names += [f'vmamba_mm.{alias.name}' for alias in node.names]
            else:
                names.append(node.module)
    return names


def check_imports(path: Path, allowed: tuple[str, ...]) -> None:
    for name in imports(path):
        standard = name.split('.')[0] in sys.stdlib_module_names
        fits = any(name == a or name.startswith(a + '.') for a in allowed)
        assert standard or fits, f'{path.relative_to(PACKAGE)} may not import {name}'


@pytest.mark.parametrize('floor', FLOORS)
def test_imports_only_go_down(floor):
    names = list(FLOORS)
    inside = [*names[:names.index(floor) + 1],
              *(Path(m).stem for m, may in GROUND.items()
                if m != '__init__.py' and 'vmamba_mm.integrations' not in may)]
    inside = [name for name in inside if name not in NOT_BELOW.get(floor, ())]
    files = sorted((PACKAGE / floor).rglob('*.py'))
    assert files
    for path in files:
        check_imports(path, (*FLOORS[floor], 'vmamba_mm.__version__',
                             *(f'vmamba_mm.{name}' for name in inside)))


def test_every_module_is_on_a_floor():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob('*.py'))}
    assert folders == set(FLOORS)
    modules = {p.name for p in PACKAGE.glob('*.py')}
    assert modules == set(GROUND)
    for module in modules:
        check_imports(PACKAGE / module, GROUND[module])


def loaded_by(*statements: str) -> list[tuple[set[str], str]]:
    """What is loaded after each of them in a process of their own, and what that has printed."""
    code = '\n'.join(f'{statement}\nprint("MODULES", *{{m.split(".")[0] for m in sys.modules}})'
                     for statement in ('import sys', *statements))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    # What is on stderr may be of any of them.
    parts = [part.partition('\n') for part in done.stdout.split('MODULES')[1:]]
    printed = [after + done.stderr for _, _, after in parts]
    return [(set(modules.split()), before)
            for (modules, _, _), before in zip(parts[1:], printed[:-1], strict=True)]


def test_importing_the_package_is_quiet_and_loads_nothing():
    [(modules, printed)] = loaded_by('import vmamba_mm')
    assert not printed and not modules & {'torch', *MM}


def test_models_by_the_names_of_configs():
    import vmamba_mm.models
    for name in vmamba_mm.models.__all__:
        assert getattr(vmamba_mm, name) is getattr(vmamba_mm.models, name)
    assert not hasattr(vmamba_mm, 'NoModel') and not hasattr(vmamba_mm, 'no_module')
    [(modules, _)] = loaded_by("import vmamba_mm; assert not hasattr(vmamba_mm, 'torch')")
    assert not modules & {'torch', *MM}


def test_importing_loads_no_more_than_a_floor_needs():
    """Ops and layers nothing of mm*, models and heads mmengine alone; nor do these load the
    libraries of a field."""
    (low, printed), (high, printed_by_models) = loaded_by(
        'import vmamba_mm.ops, vmamba_mm.layers', 'import vmamba_mm.models, vmamba_mm.heads')
    assert not printed and 'torch' in low and not low & set(MM)
    assert not printed_by_models and high & set(MM) == {'mmengine'}
    assert not high & {'diffusers', 'torch_fidelity', 'transformers', 'monai'}


def test_registry_needs_no_custom_imports():
    """As mmengine does on meeting the scope, in a fresh process."""
    loaded_by("from mmengine.registry import MODELS\n"
              "m = MODELS.build(dict(type='vmamba_mm.VMamba', arch='tiny_s1l8'))\n"
              "assert type(m).__name__ == 'VMamba'")
