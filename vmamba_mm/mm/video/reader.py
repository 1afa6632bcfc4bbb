"""Frames of ordinary video files, decoded by PyAV (FFmpeg's libraries).

A frame is asked for by its number. Its time follows from the number and the length of the file, so
that nothing but the header is read beforehand; the decoder jumps to the key frame before it and
decodes from there. In a file of variable frame rate the numbers are evenly spread in time.
"""

import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import require

# Without an index of key frames: a gap worth a jump, in seconds.
_JUMP = 5.0
# A header may promise a little more than there is: frames missing at the end, as a share of all.
_MISSING = 0.1
_CURE = 'encode it anew (ffmpeg -i IN -c:v libx264 OUT.mp4), or take it out of the data'


class Video:
    """An open video file; close it, or use it in a ``with`` statement.

    Attributes:
        num_frames: how many frames it has, at least 1.
        decoded: how many frames have been decoded so far.
        threads: of the decoder, as many as torch has in this process: one in a worker of a data
            loader.

    Args:
        path: of the file.
        short_side: scale the frames such that their shorter side has so many pixels; None keeps
            their size.

    Raises:
        UserError: if there is no such file, if it is no video, or if it has no frames.
    """

    def __init__(self, path: str | os.PathLike, short_side: int | None = None):
        require('av')
        import av

        self.path, self.short_side, self.decoded = str(path), short_side, 0
        self._errors, self._end = av.error.FFmpegError, av.error.EOFError
        if not os.path.isfile(path):
            raise UserError(f'the video {path} does not exist; put it there, or change the list, '
                            'data_root or data_prefix of the data set')
        if not os.path.getsize(path):
            raise UserError(f'the video {path} is empty (0 bytes); copy it again, or take it out '
                            'of the data')
        self._reformatter = av.video.reformatter.VideoReformatter()  # which keeps its tables
        self._open()
        try:
            self._measure()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> 'Video':
        return self

    def __exit__(self, *args) -> None:
        self.close()

    def close(self) -> None:
        self._container.close()

    def _open(self):
        """From its beginning, also a second time: not every format can go back to there."""
        import av

        try:
            self._container = av.open(self.path)
        except self._errors as err:
            raise UserError(f'the video {self.path} is corrupt, or no video ({err.strerror}); copy '
                            'it again, or take it out of the data') from err
        if not self._container.streams.video:
            kinds = ', '.join(s.type for s in self._container.streams) or 'a header'
            self.close()
            raise UserError(f'{self.path} has no pictures, only {kinds}; take it out of the data')
        self._stream, self._at_start = self._container.streams.video[0], True
        self.threads = torch.get_num_threads()
        self._stream.thread_count = self.threads
        self._stream.thread_type = 'AUTO' if self.threads > 1 else 'NONE'

    def _measure(self):
        """The number of frames, and the time of the first and from one to the next, in ticks."""
        stream, tick = self._stream, self._stream.time_base
        rate = stream.average_rate or stream.guessed_rate
        duration = stream.duration * tick if stream.duration else None
        if duration is None and self._container.duration:
            duration = self._container.duration / 1e6
        self.num_frames = stream.frames or (round(duration * rate) if duration and rate else 0)
        self._start = stream.start_time or 0
        self._timed = True
        if self.num_frames and (duration or rate):
            self._step = float((duration / self.num_frames if duration else 1 / rate) / tick)
        else:
            self._scan()

    def _scan(self):
        """Count the frames of a file whose header says nothing, without decoding them."""
        times, self.num_frames = [], 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    self.num_frames += 1
                    times.append(packet.pts)
        except self._errors as err:
            raise UserError(self._corrupt(err)) from err
        if not self.num_frames:
            raise UserError(f'the video {self.path} has no frames; take it out of the data')
        self._timed = None not in times  # else a bare stream: frames are counted
        self._start, self._step = (min(times), 1.0) if self._timed else (0, 1.0)
        if self._timed and self.num_frames > 1:
            self._step = (max(times) - min(times)) / (self.num_frames - 1)
        self.close()
        self._open()

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames by their numbers, in any order and as often as they are asked for.

        Where the file ends up to a tenth of its length before its header says, the last frame that
        there is takes the place of those that are missing.

        Returns:
            (N, H, W, 3) uint8 in BGR, the order of mm* pipelines.

        Raises:
            ValueError: on a number that is not from 0 to ``num_frames - 1``.
            UserError: if the file is cut off or corrupt, or if its frames are not in order of time.
        """
        indices = [int(i) for i in indices]
        if not indices or min(indices) < 0 or max(indices) >= self.num_frames:
            raise ValueError(f'frames must be from 0 to {self.num_frames - 1}, got {indices}')
        images, frames, frame = {}, None, None
        for index in sorted(set(indices)):
            time = self._start + (index - 0.5) * self._step
            if frames is None or self._jumps(frame, time):
                frames, frame = self._frames_from(time), None
            while frame is None or frame.time < time:
                following = next(frames, None)
                if following is None:
                    self._check_end(frame, index)
                    break
                frame = following
            images[index] = self._image(frame)
        return np.stack([images[i] for i in indices])

    def _jumps(self, frame, time):
        """Whether a key frame between the last frame and a time is known, or likely."""
        if not self._timed:
            return False
        entries = self._stream.index_entries
        number = len(entries)
        if number and entries[number - 1].timestamp > frame.dts:
            key = entries.search_timestamp(round(time), backward=True)
            return key >= 0 and entries[key].timestamp > frame.dts
        return (time - frame.time) * self._stream.time_base > _JUMP

    def _frames_from(self, time) -> Iterator['_Frame']:
        """The frames from some moment on that is not after ``time``."""
        # An index holds times of decoding, which are before those of showing: the key frame found
        # may be shown too late.
        second = float(1 / self._stream.time_base)
        for margin in (0, second, 10 * second):
            if not self._timed or time - margin <= self._start:
                break
            self._at_start = False
            try:
                self._container.seek(round(time - margin), stream=self._stream)
            except self._errors:
                break
            frames = self._decode()
            first = next(frames, None)
            if first is not None and first.time <= time + self._step:
                return itertools.chain([first], frames)
        if not self._at_start:
            self.close()
            self._open()
        return self._decode()

    def _decode(self) -> Iterator['_Frame']:
        last, self._at_start = None, False
        try:
            for number, frame in enumerate(self._container.decode(self._stream)):
                self.decoded += 1
                time = frame.pts if self._timed and frame.pts is not None else frame.dts
                time = number if not self._timed or time is None else time
                if last is not None and time <= last:
                    tick = self._stream.time_base
                    raise UserError(
                        f'the frames of the video {self.path} are not in order of time: one of '
                        f'{float(time * tick):.3f} s follows one of {float(last * tick):.3f} s; '
                        f'{_CURE}')
                last = time
                yield _Frame(frame, time)
        except self._end:  # after a jump behind the last key frame
            return
        except self._errors as err:
            raise UserError(self._corrupt(err)) from err

    def _check_end(self, frame, index):
        """Refuse a file that ends long before frame ``index``."""
        if frame is None:
            raise UserError(f'the video {self.path} has no frames that can be decoded; {_CURE}')
        there = (frame.time - self._start) / self._step + 1
        if index - there + 1 > max(2, _MISSING * self.num_frames):
            raise UserError(f'the video {self.path} ends after {there:.0f} of {self.num_frames} '
                            'frames: it is cut off, or its frames have wrong times; copy it again, '
                            f'or {_CURE}')

    def _corrupt(self, err):
        return f'the video {self.path} is corrupt ({err.strerror}); {_CURE}'

    def _image(self, frame):
        """(H, W, 3); of the size of the first, which all have but in odd files."""
        picture = frame.picture
        if not hasattr(self, '_size'):
            self._size = (picture.width, picture.height)
            if self.short_side is not None:
                scale = self.short_side / min(self._size)
                self._size = tuple(round(side * scale) for side in self._size)
        if frame.image is None:
            image = self._reformatter.reformat(
                picture, *self._size, format='bgr24', interpolation='BICUBIC',
                threads=self.threads).to_ndarray()
            # Telephones write how to turn their pictures, counterclockwise, beside them.
            frame.image = np.rot90(image, round(picture.rotation / 90))
        return frame.image


class _Frame:
    def __init__(self, picture, time):
        self.picture, self.time, self.image = picture, time, None
        self.dts = time if picture.dts is None else picture.dts

