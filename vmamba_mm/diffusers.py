"""Models, pipelines and schedulers of diffusers: see integrations/diffusers."""

from vmamba_mm.integrations.diffusers import *  # noqa: F403

# DiffusionPipeline.from_pretrained asks the module of a class for these, to know how it is loaded.
from vmamba_mm.integrations.diffusers.models import ModelMixin  # noqa: F401
from vmamba_mm.integrations.diffusers.schedulers import SchedulerMixin  # noqa: F401
