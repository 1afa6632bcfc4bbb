"""Frames of video files by their numbers: right ones, few of them decoded, and clear errors."""

import numpy as np
import pytest
import torch
from videos import cut, numbers, write_sound, write_video

from vmamba_mm.errors import UserError
from vmamba_mm.mm.video.reader import Video

FORMATS = {'a.mp4': 'libx264', 'a.mkv': 'libx264', 'a.ts': 'libx264', 'a.mov': 'mjpeg',
           'a.avi': 'mjpeg', 'a.webm': 'libvpx-vp9', 'bare.h264': 'libx264'}


@pytest.mark.parametrize('name', FORMATS)
def test_frames_by_number(tmp_path, name):
    """Of containers with an index, with none, and of a bare stream without any times."""
    path = write_video(tmp_path / name, codec=FORMATS[name], g='8')
    with Video(path) as video:
        assert video.num_frames == 24
        frames = video.read(range(24))
        assert frames.shape == (24, 24, 32, 3) and frames.dtype == np.uint8
        assert numbers(frames) == list(range(24))
    with Video(path) as video:
        assert numbers(video.read([23, 9, 9, 0, 17])) == [23, 9, 9, 0, 17]
        assert numbers(video.read([2])) == [2]  # back again


def test_colours_are_bgr_and_frames_are_scaled(tmp_path):
    red = np.broadcast_to(np.uint8([250, 0, 0]), (24, 32, 3))
    path = write_video(tmp_path / 'red.mp4', count=2, frame=lambda i: red)
    with Video(path, short_side=12) as video:
        frames = video.read([0, 1])
    assert frames.shape == (2, 12, 16, 3)
    assert (abs(frames.mean((0, 1, 2)) - [0, 0, 250]) < 12).all()


def test_pictures_of_a_turned_telephone(tmp_path):
    """A player turns them; the corner that is white comes from the file's upper right."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:12, 16:] = 250
    path = write_video(tmp_path / 'a.mp4', count=2, frame=lambda i: image, rotation=90)
    with Video(path, short_side=12) as video:
        frame = video.read([1])[0]
    assert frame.shape == (16, 12, 3)
    corners = [frame[y, x].mean() > 125 for y in (2, -3) for x in (2, -3)]
    assert corners == [True, False, False, False]  # counterclockwise: to the upper left


def test_few_frames_of_a_long_file_are_decoded(tmp_path):
    """Those from the key frame before each, and none of a file that is only opened."""
    path = write_video(tmp_path / 'long.mp4', count=600, rate=10, g='12', bf='0',
                       frame=lambda i: np.full((24, 32, 3), i // 3, np.uint8))
    wanted = [20, 140, 260, 380, 599]
    with Video(path) as video:
        assert video.num_frames == 600 and video.decoded == 0
        frames = video.read(wanted)
        assert video.decoded <= len(wanted) * 12
    assert (abs(frames.mean((1, 2, 3)) - np.array(wanted) // 3) <= 1).all()


def test_neighbours_are_decoded_once(tmp_path):
    path = write_video(tmp_path / 'a.mp4', g='6')
    with Video(path) as video:
        assert numbers(video.read([7, 8, 9, 10])) == [7, 8, 9, 10]
        assert video.decoded <= 12


def test_as_many_threads_as_torch(tmp_path):
    path = write_video(tmp_path / 'a.mp4')
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            with Video(path) as video:
                assert video.threads == number
                assert numbers(video.read([5])) == [5]
    finally:
        torch.set_num_threads(threads)


def test_uneven_times(tmp_path):
    """Frames of a variable rate are numbered by time, not in the order of the file."""
    path = write_video(tmp_path / 'a.mp4', count=4, codec='mjpeg', times=[0, 8, 9, 10])
    with Video(path) as video:
        assert video.num_frames == 4
        assert numbers(video.read(range(4))) == [0, 1, 1, 1]


def test_the_last_frame_is_repeated_at_a_ragged_end(tmp_path):
    path = cut(write_video(tmp_path / 'a.mkv', count=40, codec='mjpeg'), 0.95)
    with Video(path) as video:
        last = numbers(video.read(range(video.num_frames)))
    end = max(last)
    assert 34 <= end < 39 and last == [*range(end), *[end] * (40 - end)]


BROKEN = {
    'missing': (lambda path: None, 'does not exist'),
    'empty': (lambda path: path.write_bytes(b''), r'is empty \(0 bytes\)'),
    'text': (lambda path: path.write_text('no video'), 'is corrupt, or no video'),
    'no header': (lambda path: cut(write_video(path), 0.5), 'is corrupt, or no video'),
    'sound': (write_sound, 'has no pictures, only audio'),
    'backwards': (lambda path: write_video(path, codec='mjpeg', times=range(24)[::-1]),
                  'ends after 1 of 24 frames'),
    'at once': (lambda path: write_video(path, codec='mjpeg', times=[0] * 24),
                'ends after 1 of 24 frames'),
    'out of order': (lambda path: write_video(
        path, codec='mjpeg', times=[0, 1, 2, 7, 4, 5, 6, 3, *range(8, 24)]),
        r'not in order of time: one of 0.250 s follows one of 0.500 s; encode it anew \(ffmpeg')}


@pytest.mark.parametrize('what', BROKEN)
def test_broken_files(tmp_path, what):
    make, message = BROKEN[what]
    path = tmp_path / 'a.mp4'
    make(path)
    with pytest.raises(UserError, match=message) as info, Video(path) as video:
        video.read(range(video.num_frames))
    assert str(path) in str(info.value) and '\n' not in str(info.value)


def test_a_file_that_is_cut_off(tmp_path):
    path = cut(write_video(tmp_path / 'a.mkv', count=40, codec='mjpeg'), 0.5)
    with Video(path) as video:
        assert numbers(video.read([3])) == [3]
    with pytest.raises(UserError, match=r'a.mkv ends after \d\d of 40 frames.*copy it again'), \
            Video(path) as video:
        video.read([39])


def test_numbers_that_there_are_not(tmp_path):
    with Video(write_video(tmp_path / 'a.mp4')) as video:
        for indices in ([24], [-1], []):
            with pytest.raises(ValueError, match='from 0 to 23'):
                video.read(indices)
