"""What mmengine puts around a model."""

from mmengine.model import BaseTTAModel, is_model_wrapper


def unwrapped(model):
    """The model itself, inside what makes it parallel or augments its test."""
    if is_model_wrapper(model):
        model = model.module
    return model.module if isinstance(model, BaseTTAModel) else model
