"""mamba_ssm, causal_conv1d and selective_scan_cuda* without a build; see integrations/dropin.

``import vmamba_mm.dropin; vmamba_mm.dropin.install()``, or
``python -m vmamba_mm.dropin SCRIPT ARGUMENTS``.
"""

from vmamba_mm.integrations.dropin import (
    install,
    install_transformers,
    main,
    uninstall,
    uninstall_transformers,
)

__all__ = ['install', 'install_transformers', 'uninstall', 'uninstall_transformers']

if __name__ == '__main__':
    main()
