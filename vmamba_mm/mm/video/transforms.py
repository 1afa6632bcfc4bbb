"""From a video file to clips: ``type='vmamba_mm.LoadClips'``, ...

Between the steps a sample has ``clips``, (V, T, H, W, 3) uint8 in BGR: V views of T frames. Views
are what a test averages over (times and crops) and what a training repeats
(:class:`RepeatClips`). mmcv's and mmpretrain's transforms of images work on clips inside
:class:`PerFrame`.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import prepare_mm, require_working
from vmamba_mm.mm.video import sampling as samplings
from vmamba_mm.mm.video.reader import Video
from vmamba_mm.registry import TRANSFORMS

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmcv.transforms import BaseTransform, Compose  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402


@TRANSFORMS.register_module()
class LoadClips(BaseTransform):
    """Decode the frames of one or more clips of ``video_path`` into ``clips``.

    Args:
        num_frames: of a clip.
        sampling: 'sparse' (:func:`vmamba_mm.mm.video.sampling.sparse`: the whole video) or 'dense'
            (:func:`vmamba_mm.mm.video.sampling.dense`: neighbouring frames). Both say what happens
            with a video that is too short.
        num_clips: clips of a video, which become views.
        stride: of 'dense', frames from one to the next.
        random: draw the frames, for training; else they are the same each time.
        offsets: of 'sparse' without ``random``, the place of each clip in the segments, in [0, 1);
            None spreads them evenly.
        short_side: scale the frames such that their shorter side has so many pixels, which the
            decoder does; None keeps their size.
        on_error: 'raise', or 'skip' to take another random video in training in the place of a
            broken one, and say so.

    Raises:
        ValueError: on an argument that is not allowed.
        UserError: on a file that is missing, broken or empty, or whose frames are out of order.
    """

    def __init__(self, num_frames: int, sampling: str = 'sparse', num_clips: int = 1,
                 stride: int | None = None, random: bool = False,
                 offsets: Sequence[float] | None = None, short_side: int | None = None,
                 on_error: str = 'raise'):
        if sampling not in samplings.SAMPLINGS:
            raise ValueError(f'sampling must be one of {samplings.SAMPLINGS}, got {sampling!r}')
        for name, value in dict(num_frames=num_frames, num_clips=num_clips, stride=stride,
                                short_side=short_side).items():
            optional = name in ('stride', 'short_side')
            if not (isinstance(value, int) and value >= 1 or optional and value is None):
                raise ValueError(f'{name} must be an int of at least 1, got {value!r}')
        if (sampling == 'dense') != (stride is not None):
            raise ValueError("stride, the frames from one to the next, belongs to sampling='dense' "
                             f'and is needed there, got sampling={sampling!r}, stride={stride!r}')
        if offsets is not None and (
                sampling != 'sparse' or random or len(offsets) != num_clips
                or not all(0 <= offset < 1 for offset in offsets)):
            raise ValueError(f"offsets must be {num_clips} number(s) in [0, 1), one for each clip, "
                             "with sampling='sparse' and random=False, got "
                             f'{offsets!r}')
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self.num_frames, self.sampling, self.num_clips = num_frames, sampling, num_clips
        self.stride, self.random, self.offsets = stride, random, offsets
        self.short_side, self.on_error = short_side, on_error

    def sample(self, total: int) -> np.ndarray:
        """(num_clips, num_frames) numbers of frames in a video of ``total``."""
        if self.sampling == 'sparse':
            return samplings.sparse(total, self.num_frames, self.num_clips, self.random,
                                    self.offsets)
        return samplings.dense(total, self.num_frames, self.stride, self.num_clips, self.random)

    def transform(self, results: dict) -> dict | None:
        try:
            with Video(results['video_path'], self.short_side) as video:
                indices = self.sample(video.num_frames)
                frames = video.read(indices.ravel())
                results['total_frames'] = video.num_frames
        except UserError as err:
            if self.on_error == 'raise':
                raise
            print(f'skipped: {err}', flush=True)
            return None
        results['clips'] = frames.reshape(*indices.shape, *frames.shape[1:])
        results['frame_indices'] = indices
        results['ori_shape'] = results['img_shape'] = frames.shape[1:3]
        return results


@TRANSFORMS.register_module()
class PerFrame(BaseTransform):
    """Run transforms of images on every frame; all frames of a clip see the same random numbers.

    So a random crop, a flip or RandAugment is the same in all frames of a clip, and another one in
    the next view. The same are the numbers of Python's and numpy's generators, from which mmcv's
    and mmpretrain's transforms draw; torch's go on, so that the noise of
    ``vmamba_mm.RandomErasing`` differs from frame to frame.

    Args:
        transforms: configs of transforms that work on ``img``, and on nothing else.
    """

    def __init__(self, transforms: Sequence):
        self.steps = Compose(transforms)

    def transform(self, results: dict) -> dict:
        views = [self._transform_view(clip) for clip in results['clips']]
        results['clips'] = np.stack(views)
        results['img_shape'] = results['clips'].shape[2:4]
        return results

    def _transform_view(self, clip):
        state, frames = (random.getstate(), np.random.get_state()), []
        for number, frame in enumerate(clip):
            if number:
                random.setstate(state[0])
                np.random.set_state(state[1])
            frames.append(self.steps(dict(img=frame, img_shape=frame.shape[:2],
                                          ori_shape=frame.shape[:2]))['img'])
        return np.stack(frames)


@TRANSFORMS.register_module()
class RepeatClips(BaseTransform):
    """Repeated augmentation: several augmentations of a video that is decoded once.

    Each becomes a view, and in training each view is a sample of the batch: of B videos there are
    ``times * B`` samples (Hoffer et al., arXiv 1901.09335).

    Args:
        times: how often.
        transforms: configs of the transforms that are repeated.
    """

    def __init__(self, times: int, transforms: Sequence):
        if not isinstance(times, int) or times < 1:
            raise ValueError(f'times must be an int of at least 1, got {times!r}')
        self.times, self.steps = times, Compose(transforms)

    def transform(self, results: dict) -> dict:
        # A copy each: some transforms write into the image.
        repeats = [self.steps(dict(results, clips=results['clips'].copy()))
                   for _ in range(self.times)]
        return dict(repeats[-1], clips=np.concatenate([r['clips'] for r in repeats]))


@TRANSFORMS.register_module()
class ThreeCrops(BaseTransform):
    """Square crops at the beginning, the middle and the end of the longer side: three times the
    views, with the crops of one view after another.

    Args:
        crop_size: side of the squares, at most the shorter side of the frames; along the shorter
            side they are in the middle.
    """

    def __init__(self, crop_size: int):
        self.crop_size = crop_size

    def transform(self, results: dict) -> dict:
        clips, size = results['clips'], self.crop_size
        height, width = clips.shape[2:4]
        if min(height, width) < size:
            raise ValueError(f'crop_size={size} of ThreeCrops is larger than the frames, which are '
                             f'{width}x{height}: resize them before, to at least {size}')
        places = []
        for step in range(3):
            y, x = ((height - size) * step // 2, (width - size) // 2) if height > width else \
                ((height - size) // 2, (width - size) * step // 2)
            places.append(clips[:, :, y:y + size, x:x + size])
        crops = np.stack(places, 1)
        results['clips'] = crops.reshape(-1, *crops.shape[2:])
        results['img_shape'] = (size, size)
        return results


@TRANSFORMS.register_module()
class PackClips(BaseTransform):
    """The end of a pipeline: ``inputs`` (V, 3, T, H, W) uint8 and mmpretrain's DataSample.

    Args:
        meta_keys: of the sample, to be kept in the DataSample.
    """

    META_KEYS = ('sample_idx', 'video_path', 'ori_shape', 'img_shape', 'total_frames')

    def __init__(self, meta_keys: Sequence[str] = META_KEYS):
        self.meta_keys = tuple(meta_keys)

    def transform(self, results: dict) -> dict:
        sample = DataSample()
        if 'gt_label' in results:
            sample.set_gt_label(results['gt_label'])
        sample.set_metainfo({key: results[key] for key in self.meta_keys if key in results})
        clips = np.ascontiguousarray(results['clips'].transpose(0, 4, 1, 2, 3))
        return dict(inputs=torch.from_numpy(clips), data_samples=sample)
