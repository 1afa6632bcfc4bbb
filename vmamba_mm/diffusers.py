"""Models, pipelines and schedulers of diffusers: see integrations/diffusers."""

from vmamba_mm.integrations.diffusers import *  # noqa: F403
from vmamba_mm.integrations.diffusers import schedulers as _schedulers


def __getattr__(name: str):
    """diffusers' base classes, which its ``DiffusionPipeline.from_pretrained`` asks the module of a
    class for, to know how it is loaded."""
    if name in ('ModelMixin', 'SchedulerMixin'):
        return getattr(_schedulers, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
