"""Models on mmseg's classes, which are imported when a config names one of them."""

from vmamba_mm.registry import MODELS


@MODELS.register_module()
def ConcatDecodeHead(**kwargs):
    """:class:`vmamba_mm.mm.segmentation.on_mmseg.ConcatDecodeHead`."""
    from vmamba_mm.mm.segmentation import on_mmseg

    return on_mmseg.ConcatDecodeHead(**kwargs)


@MODELS.register_module()
def ImagesDataPreProcessor(**kwargs):
    """:class:`vmamba_mm.mm.segmentation.on_mmseg.ImagesDataPreProcessor`."""
    from vmamba_mm.mm.segmentation import on_mmseg

    return on_mmseg.ImagesDataPreProcessor(**kwargs)
