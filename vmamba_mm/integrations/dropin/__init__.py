"""The modules that other repositories import for S6 and SSD, on the ops of this package.

``install()`` makes ``mamba_ssm``, ``causal_conv1d``, ``causal_conv1d_cuda`` and VMamba's
``selective_scan_cuda*`` importable, on a CPU and on a GPU, without a build; ``modules.MODULES``
says what each of them has. Names, signatures and results are those of mamba_ssm 1.0 to 2.3 (as far
as Mamba-1 and Mamba-2 go), of causal_conv1d 1.0 to 1.6, and of the forks of Vim, VideoMamba,
SegMamba and VMamba; the code is this package's own.
"""

from vmamba_mm.integrations.dropin.finder import install, uninstall
from vmamba_mm.integrations.dropin.hugging_face import (
    install_transformers,
    uninstall_transformers,
)
from vmamba_mm.integrations.dropin.run import main

__all__ = ['install', 'install_transformers', 'main', 'uninstall', 'uninstall_transformers']
