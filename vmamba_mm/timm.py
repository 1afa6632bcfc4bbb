"""timm: ``import vmamba_mm.timm``, then ``timm.create_model``; see integrations/timm.py."""

from vmamba_mm.integrations.timm import *  # noqa: F403
