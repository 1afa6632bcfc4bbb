"""DiS in diffusers: the model, the pipeline, and what its schedulers need.

    from vmamba_mm.diffusers import DiS2DModel, DiSPipeline, published_scheduler

    model = DiS2DModel.from_checkpoint('dis.pt')             # of the public code
    pipe = DiSPipeline(model, published_scheduler())
    pipe.save_pretrained('dis')                              # safetensors and JSON
    images = DiSPipeline.from_pretrained('dis')(class_labels=[1, 2]).images
"""

from importlib.util import find_spec

from vmamba_mm.errors import UserError

if find_spec('diffusers') is None:
    raise UserError('the package diffusers is not installed; install it with: '
                    "pip install 'vmamba_mm[diffusion]'")

from vmamba_mm.integrations.diffusers.models import DiS2DModel
from vmamba_mm.integrations.diffusers.pipelines import DiSPipeline
from vmamba_mm.integrations.diffusers.schedulers import RespacedDDIMScheduler, published_scheduler

__all__ = ['DiS2DModel', 'DiSPipeline', 'RespacedDDIMScheduler', 'published_scheduler']
