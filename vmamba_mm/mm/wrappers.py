"""What mmengine puts around a model."""

from mmengine.model import BaseTTAModel, MMDistributedDataParallel, is_model_wrapper

from vmamba_mm.layers.parallel import share_buckets
from vmamba_mm.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class BucketSharingDDP(MMDistributedDataParallel):
    """mmengine's, but that blocks write gradients into the buckets that the processes exchange:
    :func:`vmamba_mm.layers.parallel.share_buckets`. Arguments as there, with
    ``gradient_as_bucket_view=True`` by default."""

    def __init__(self, module, *args, gradient_as_bucket_view: bool = True, **kwargs):
        super().__init__(module, *args, gradient_as_bucket_view=gradient_as_bucket_view, **kwargs)
        share_buckets(self)


def unwrapped(model):
    """The model itself, inside what makes it parallel or augments its test."""
    if is_model_wrapper(model):
        model = model.module
    return model.module if isinstance(model, BaseTTAModel) else model
