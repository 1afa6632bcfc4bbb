"""Which frames make a clip."""

import numpy as np
import pytest

from vmamba_mm.mm.video.sampling import dense, sparse


def test_sparse_takes_the_middle_of_each_segment():
    assert sparse(24, 4).tolist() == [[3, 9, 15, 21]]
    assert sparse(24, 4, num_clips=2).tolist() == [[2, 8, 14, 20], [4, 10, 16, 22]]
    assert sparse(24, 4, num_clips=2, offsets=(0, 0.5)).tolist() == [[0, 6, 12, 18],
                                                                     [3, 9, 15, 21]]
    assert sparse(1, 4).tolist() == [[0] * 4]


def test_sparse_draws_one_of_each_segment():
    np.random.seed(0)
    drawn = np.concatenate([sparse(24, 4, num_clips=3, random=True) for _ in range(60)])
    for segment, values in enumerate(drawn.T):
        assert set(values) == set(range(6 * segment, 6 * segment + 6))


@pytest.mark.parametrize('random', [True, False])
@pytest.mark.parametrize('total', [1, 3, 7])
def test_a_short_video_repeats_frames(total, random):
    """Sparse: all frames, evenly. Dense: the last one."""
    clip, = sparse(total, 2 * total, random=random)
    assert clip.tolist() == sorted(clip) and set(clip) == set(range(total))
    clip, = dense(total, 8, stride=2, random=random)
    assert clip.tolist() == [min(2 * i, total - 1) for i in range(8)]


def test_dense_spreads_the_clips():
    assert dense(20, 3, stride=2).tolist() == [[7, 9, 11]]
    assert dense(20, 3, stride=2, num_clips=3).tolist() == [[0, 2, 4], [7, 9, 11], [15, 17, 19]]
    np.random.seed(0)
    starts = {dense(20, 3, stride=2, random=True)[0, 0] for _ in range(200)}
    assert starts == set(range(16))
