"""Which frames of a video make a clip: numbers from 0 on, the random ones from numpy's generator.

Both functions return (number of clips, frames of a clip) whole numbers. A video that is shorter
than the clip is no error: frames are repeated, as each function says.
"""

from collections.abc import Sequence

import numpy as np

SAMPLINGS = ('sparse', 'dense')


def sparse(total: int, num_frames: int, num_clips: int = 1, random: bool = False,
           offsets: Sequence[float] | None = None) -> np.ndarray:
    """The whole video in ``num_frames`` segments of one length, one frame of each.

    As in temporal segment networks (Wang et al., arXiv 1608.00859, section 3). In a video of fewer
    frames than segments, neighbouring segments share a frame.

    Args:
        total: frames of the video.
        num_frames: frames of a clip.
        num_clips: clips; each has the frames at another place of the segments.
        random: draw the place in every segment; else it is the same in all.
        offsets: of each clip, the place in a segment, in [0, 1). None for ``(k + 1) / (n + 1)`` of
            clip k of n: the middle of one clip.
    """
    if random:
        places = np.random.random_sample((num_clips, num_frames))
    else:
        if offsets is None:
            offsets = [(k + 1) / (num_clips + 1) for k in range(num_clips)]
        places = np.asarray(offsets, float)[:, None]
    frames = (np.arange(num_frames) + places) * total / num_frames
    return np.minimum(frames.astype(np.int64), total - 1)


def dense(total: int, num_frames: int, stride: int, num_clips: int = 1, random: bool = False
          ) -> np.ndarray:
    """Frames that are ``stride`` apart, from one moment on.

    Where a video ends before the clip does, its last frame is repeated.

    Args:
        total, num_frames, num_clips: as of :func:`sparse`.
        stride: frames from one to the next.
        random: draw the moment at which each clip begins; else the clips are evenly spread, the
            first at the beginning of the video and the last at its end, and a single one is in
            the middle.
    """
    span = max(total - ((num_frames - 1) * stride + 1), 0)
    if random:
        starts = np.random.randint(0, span + 1, num_clips)
    elif num_clips == 1:
        starts = np.array([span // 2])
    else:
        starts = np.linspace(0, span, num_clips).astype(np.int64)
    return np.minimum(starts[:, None] + stride * np.arange(num_frames), total - 1)
