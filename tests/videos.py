"""Small video files whose frames tell their number, and what is wrong with some files."""

import itertools

import numpy as np
import pytest

av = pytest.importorskip('av', reason="PyAV is not installed (extra 'video')")

STEP = 6  # of the grey value from one frame to the next


def write_video(path, count=24, size=(32, 24), rate=12, codec='libx264', times=None, frame=None,
                rotation=0, **options):
    """Frame i is grey of value ``STEP * i``, or ``frame(i)``, an RGB array.

    Args:
        times: of the packets in the order of coding, in frames, for files out of order; the codec
            must be one whose frames are coded on their own.
        rotation: how far a player has to turn the pictures, in degrees counterclockwise.
        options: of the codec, such as ``g='6'`` for a key frame every six.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = 'yuvj420p' if codec == 'mjpeg' else 'yuv420p'
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        for i in range(count):
            image = np.full((size[1], size[0], 3), STEP * i, np.uint8) if frame is None \
                else frame(i)
            packets += stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24'))
        for i, packet in enumerate([*packets, *stream.encode()]):
            if times is not None:
                increasing = all(a < b for a, b in itertools.pairwise(times))
                packet.pts, packet.dts = times[i], times[i] if increasing else i - count
                packet.time_base = stream.codec_context.time_base
            file.mux(packet)
    return path


def numbers(frames):
    """The numbers that grey frames (N, H, W, 3) tell."""
    return np.rint(frames.mean((1, 2, 3)) / STEP).astype(int).tolist()


def write_sound(path):
    """A file with sound and no pictures."""
    with av.open(str(path), 'w') as file:
        stream = file.add_stream('aac', rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp',
                                           layout='mono')
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    return path


def cut(path, share):
    """Only the first ``share`` of a file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    return path
