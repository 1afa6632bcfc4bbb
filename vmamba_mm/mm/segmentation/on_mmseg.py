"""Classes of mmseg, which this module imports: a decode head, and a preprocessor of pairs."""

from collections.abc import Sequence

from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

from vmamba_mm.heads import ConcatDecoder


class ConcatDecodeHead(BaseDecodeHead):
    """:class:`vmamba_mm.heads.ConcatDecoder` in mmseg's segmentors.

    The logits have four times the size of the largest map, and mmseg brings them to that of the
    labels. For one class beside the background, ``num_classes=2, out_channels=1``, with losses of
    one logit.

    Args:
        in_channels: of the maps, from the largest on.
        threshold: probability from which a pixel is of the class, with one logit.
        kwargs: the other arguments of mmseg's ``BaseDecodeHead``: ``num_classes``,
            ``out_channels``, ``loss_decode``, ``ignore_index``, ``align_corners`` and so on.
    """

    def __init__(self, in_channels: Sequence[int], threshold: float = 0.5, **kwargs):
        kwargs = dict(init_cfg=None, dropout_ratio=0) | kwargs  # as torch initialises
        super().__init__(in_channels=list(in_channels), in_index=list(range(len(in_channels))),
                         input_transform='multiple_select', channels=ConcatDecoder.channels,
                         threshold=threshold, **kwargs)
        del self.conv_seg
        self.decoder = ConcatDecoder(in_channels, self.out_channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.decoder(self._transform_inputs(inputs))


class ImagesDataPreProcessor(SegDataPreProcessor):
    """mmseg's preprocessor for images that lie one behind the other in the channels.

    Args:
        mean, std: of the channels of one image.
        num_images: how many there are.
        kwargs: of mmseg's ``SegDataPreProcessor``; channels are not reversed.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], num_images: int = 2, **kwargs):
        super().__init__(mean=mean, std=std, **kwargs)
        # Not as an argument: releases differ in how many channels they allow there.
        for name in ('mean', 'std'):
            repeated = getattr(self, name).repeat(num_images, 1, 1)
            self.register_buffer(name, repeated, persistent=False)
