"""``python -m vmamba_mm.dropin SCRIPT ARGUMENTS``: a script that needs no change."""

import os
import runpy
import sys
from collections.abc import Sequence

from vmamba_mm.integrations.dropin.finder import install
from vmamba_mm.integrations.dropin.modules import ROOTS

USAGE = '''usage: python -m vmamba_mm.dropin [--replace] SCRIPT [ARGUMENTS]
       python -m vmamba_mm.dropin [--replace] -m MODULE [ARGUMENTS]

Runs a script or a module as Python does, with mamba_ssm, causal_conv1d and selective_scan_cuda* on
the ops of vmamba_mm. What is installed of them is left alone, unless --replace is given.'''


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line names, as ``__main__``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    replace = arguments[:1] == ['--replace']
    arguments = arguments[replace:]
    if arguments[:1] in (['-h'], ['--help']):
        print(USAGE)
        return
    is_module = arguments[:1] == ['-m']
    arguments = arguments[is_module:]
    if not arguments or arguments[0].startswith('-'):
        sys.exit(USAGE)
    target = arguments[0]
    if not is_module and not os.path.exists(target):
        sys.exit(f'vmamba_mm.dropin: there is no file {target}')
    provided = install(replace)
    left = [name for name in ROOTS if name not in provided]
    if left:
        print(f'vmamba_mm.dropin: {", ".join(left)} is installed and used as it is; --replace '
              'puts vmamba_mm in its place', file=sys.stderr)
    sys.argv = arguments
    if is_module:  # sys.path begins with the working folder, as it has to
        runpy.run_module(target, run_name='__main__', alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name='__main__')
