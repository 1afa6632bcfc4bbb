"""Puts into a wheel what lies beside the package: the kernels' sources, and the configs where mm*
look for them.

In a checkout vmamba_mm/paths.py finds them where they are.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: what lies in the checkout -> its place in the package
BESIDE = {'configs': '.mim/configs', 'model-index.yml': '.mim/model-index.yml',
          'kernels': 'kernels'}
#: what of it an installed package does not use: what each kernel may use, for their developers
NOT_USED = 'resources.json'


class BuildWithFolders(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # the package is used where it is
            return
        for name, place in BESIDE.items():
            source, target = ROOT / name, Path(self.build_lib) / 'vmamba_mm' / place
            if not source.exists():
                sys.exit(f'{source} is missing: vmamba_mm is built from a whole checkout or sdist')
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file():
                shutil.copyfile(source, target)
            else:
                shutil.copytree(source, target, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns('__pycache__', NOT_USED))


setup(cmdclass={'build_py': BuildWithFolders})
