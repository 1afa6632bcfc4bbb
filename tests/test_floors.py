"""Imports only go down: ops <- layers <- models <- configs, tools, tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vmamba_mm

PACKAGE = Path(vmamba_mm.__file__).parent
MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
#: what the modules below a path may import, besides the standard library and themselves
ALLOWED = {
    '__init__.py': (),
    'ops': ('torch', 'triton', 'vmamba_mm.ops', 'vmamba_mm.atomic', 'vmamba_mm.links'),
    'testing.py': ('torch', 'vmamba_mm.ops'),
    'layers': ('torch', 'vmamba_mm.ops', 'vmamba_mm.layers'),
    'arch.py': (),
    'atomic.py': (),
    'config.py': (),
    'links.py': (),
    'compat.py': ('torch', 'numpy', 'mmengine'),
    'checkpoint.py': ('torch', 'vmamba_mm.arch', 'vmamba_mm.compat'),
    'files.py': ('torch', 'safetensors', 'vmamba_mm.atomic', 'vmamba_mm.compat',
                 'vmamba_mm.checkpoint'),
    'registry.py': ('mmengine',),
    'loading.py': ('mmengine', 'vmamba_mm.compat', 'vmamba_mm.files'),
    'models': ('torch', 'mmengine', 'vmamba_mm.ops', 'vmamba_mm.layers', 'vmamba_mm.models',
               'vmamba_mm.registry', 'vmamba_mm.arch', 'vmamba_mm.compat', 'vmamba_mm.checkpoint',
               'vmamba_mm.files', 'vmamba_mm.loading', 'vmamba_mm.config'),
    'engine': ('torch', 'numpy', 'matplotlib', 'mmengine', 'mmcv', 'vmamba_mm.compat',
               'vmamba_mm.registry', 'vmamba_mm.engine', 'vmamba_mm.checkpoint',
               'vmamba_mm.atomic', 'vmamba_mm.files', 'vmamba_mm.config'),
    # Imported by nobody but the user, who has timm or mmpretrain then.
    'timm.py': ('torch', 'timm', 'vmamba_mm'),
    'mmpretrain.py': ('mmpretrain', 'vmamba_mm.compat', 'vmamba_mm.links'),
    # Imported when a config names one of its transforms.
    'transforms.py': ('torch', 'numpy', 'cv2', 'mmcv', 'mmpretrain', 'vmamba_mm.compat',
                      'vmamba_mm.config', 'vmamba_mm.registry'),
}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names.append(node.module)
    return names


@pytest.mark.parametrize('floor', ALLOWED)
def test_imports_only_go_down(floor):
    root = PACKAGE / floor
    files = [root] if root.is_file() else sorted(root.rglob('*.py'))
    assert files
    allowed = ALLOWED[floor]
    for path in files:
        for name in imports(path):
            standard = name.split('.')[0] in sys.stdlib_module_names
            fits = any(name == a or name.startswith(a + '.') for a in allowed)
            assert standard or fits, f'{path.relative_to(PACKAGE)} may not import {name}'


def loaded_by(statement: str) -> tuple[set[str], str]:
    code = f'import sys\n{statement}\nprint("MODULES", *{{m.split(".")[0] for m in sys.modules}})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    printed, _, modules = (done.stdout + done.stderr).partition('MODULES')
    return set(modules.split()), printed


def test_importing_the_package_is_quiet_and_loads_nothing():
    modules, printed = loaded_by('import vmamba_mm')
    assert not printed and not modules & {'torch', *MM}


def test_importing_ops_and_layers_loads_no_mm_package():
    modules, printed = loaded_by('import vmamba_mm.ops, vmamba_mm.layers')
    assert not printed and 'torch' in modules and not modules & set(MM)


def test_importing_models_loads_mmengine_alone():
    modules, printed = loaded_by('import vmamba_mm.models')
    assert not printed and modules & set(MM) == {'mmengine'}


def test_registry_needs_no_custom_imports():
    """As mmengine does on meeting the scope, in a fresh process."""
    loaded_by("from mmengine.registry import MODELS\n"
              "m = MODELS.build(dict(type='vmamba_mm.VMamba', arch='tiny_s1l8'))\n"
              "assert type(m).__name__ == 'VMamba'")
