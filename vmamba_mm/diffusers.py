"""Models, pipelines and schedulers of diffusers: see integrations/diffusers."""

from vmamba_mm.integrations.diffusers import *  # noqa: F403
