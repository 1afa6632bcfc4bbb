"""mmpretrain's hub: ``import vmamba_mm.mmpretrain``; see integrations/mmpretrain.py."""

import vmamba_mm.integrations.mmpretrain  # noqa: F401
