"""The data set of videos and the transforms of clips."""

import numpy as np
import pytest
import torch
from videos import STEP, numbers, write_video

from vmamba_mm.errors import UserError


@pytest.fixture
def make(mm):
    """make(type, ...): a data set or transform as configs name it, in mmpretrain's scope."""
    from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope

    init_default_scope('mmpretrain')

    def make(kind, **settings):
        registry = DATASETS if kind == 'VideoDataset' else TRANSFORMS
        return registry.build(dict(type=f'vmamba_mm.{kind}', **settings))

    return make


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """24 frames of 32x24."""
    return str(write_video(tmp_path_factory.mktemp('video') / 'a.mp4'))


# --- data sets ------------------------------------------------------------------------------

@pytest.fixture
def root(tmp_path):
    for name in ('train/run/b.mp4', 'train/run/a.webm', 'train/jump/c.avi', 'train/jump/notes.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'x')
    return tmp_path


def rows(dataset):
    return [(info['video_path'], info['gt_label']) for info in map(dataset.get_data_info,
                                                                   range(len(dataset)))]


def test_a_folder_for_each_class(make, root):
    dataset = make('VideoDataset', data_root=str(root), data_prefix='train')
    assert dataset.metainfo['classes'] == ('jump', 'run')
    assert rows(dataset) == [(f'{root}/train/jump/c.avi', 0), (f'{root}/train/run/a.webm', 1),
                             (f'{root}/train/run/b.mp4', 1)]


@pytest.mark.parametrize('separator, text', [
    (None, 'run/b.mp4 1\n\njump/the long jump.avi\t0\n'), (',', 'run/b.mp4,1\njump/a, b.avi,0')])
def test_a_list(make, root, separator, text):
    (root / 'list.csv').write_text(text)
    dataset = make('VideoDataset', data_root=str(root), data_prefix='train', ann_file='list.csv',
                   separator=separator, classes=['jump', 'run'])
    second = 'jump/the long jump.avi' if separator is None else 'jump/a, b.avi'
    assert rows(dataset) == [(f'{root}/train/run/b.mp4', 1), (f'{root}/train/{second}', 0)]
    assert dataset.get_gt_labels().tolist() == [1, 0]


@pytest.mark.parametrize('line', ['run/b.mp4', 'run/b.mp4 one', 'run/b.mp4 -1', 'run/b.mp4,1', '3'])
def test_a_line_that_is_none(make, root, line):
    (root / 'list.csv').write_text(f'run/b.mp4 1\n{line}\n')
    with pytest.raises(UserError, match=f"line 2 of .*list.csv is '{line}': expected the path of a "
                                        'video, a space and the number of its class'):
        make('VideoDataset', data_root=str(root), ann_file='list.csv')


def test_a_sample_that_cannot_be_read(make, root):
    """As the tools read it: the file is named; or, where the config says so, passed over."""
    from vmamba_mm.mm.hooks.data import SampleReader

    write_video(root / 'train/run/b.mp4')
    load = dict(type='vmamba_mm.LoadClips', num_frames=2)
    common = dict(data_root=str(root), data_prefix='train')
    dataset = make('VideoDataset', pipeline=[load], **common)
    with pytest.raises(UserError, match=f'{root}/train/jump/c.avi is corrupt, or no video'):
        SampleReader(dataset)([0])
    np.random.seed(0)
    dataset = make('VideoDataset', pipeline=[dict(load, on_error='skip')], **common)
    sample, = SampleReader(dataset)([0])
    assert sample['video_path'] == f'{root}/train/run/b.mp4' and sample['clips'].shape[1] == 2


# --- transforms -----------------------------------------------------------------------------

def test_load_clips(make, path):
    results = make('LoadClips', num_frames=4, num_clips=2)(dict(video_path=path))
    assert results['clips'].shape == (2, 4, 24, 32, 3) and results['total_frames'] == 24
    assert [numbers(clip) for clip in results['clips']] == results['frame_indices'].tolist() == \
        [[2, 8, 14, 20], [4, 10, 16, 22]]
    results = make('LoadClips', num_frames=3, sampling='dense', stride=2, short_side=12)(
        dict(video_path=path))
    assert results['clips'].shape == (1, 3, 12, 16, 3)
    assert numbers(results['clips'][0]) == [9, 11, 13]
    np.random.seed(0)
    load = make('LoadClips', num_frames=4, random=True)
    assert len({tuple(load(dict(video_path=path))['frame_indices'][0]) for _ in range(5)}) > 1


@pytest.mark.parametrize('settings, message', [
    (dict(num_frames=0), 'num_frames must be an int of at least 1'),
    (dict(num_frames=4, num_clips=1.5), 'num_clips must be an int'),
    (dict(num_frames=4, sampling='uniform'), "one of \\('sparse', 'dense'\\)"),
    (dict(num_frames=4, sampling='dense'), "stride.*belongs to sampling='dense'"),
    (dict(num_frames=4, stride=2), "stride.*belongs to sampling='dense'"),
    (dict(num_frames=4, offsets=(0.5, 0.6)), 'offsets must be 1 number'),
    (dict(num_frames=4, offsets=(1.0,)), r'offsets must be 1 number\(s\) in \[0, 1\)'),
    (dict(num_frames=4, on_error='ignore'), "on_error must be 'raise' or 'skip'")])
def test_wrong_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make('LoadClips', **settings)


def test_frames_of_a_clip_are_augmented_alike(make):
    """A random crop, flip and RandAugment; each view draws its own."""
    image = np.random.default_rng(0).integers(0, 255, (1, 1, 20, 30, 3), np.uint8)
    clips = np.broadcast_to(image, (4, 5, 20, 30, 3)).copy()
    np.random.seed(1)
    results = make('PerFrame', transforms=[
        dict(type='vmamba_mm.RandAugment', policies='timm_increasing', num_policies=2,
             total_level=10, magnitude_level=7, magnitude_std=0.5,
             hparams=dict(pad_val=[104, 116, 124])),
        dict(type='vmamba_mm.RandomResizedCrop', scale=16),
        dict(type='RandomFlip', prob=0.5)])(dict(clips=clips))
    clips = results['clips']
    assert clips.shape == (4, 5, 16, 16, 3) and results['img_shape'] == (16, 16)
    assert (clips == clips[:, :1]).all()
    assert len({view[0].tobytes() for view in clips}) == 4


def test_erased_areas_are_alike_and_their_noise_is_not(make):
    clips = np.zeros((1, 3, 16, 16, 3), np.uint8)
    np.random.seed(0)
    clips = make('PerFrame', transforms=[dict(
        type='vmamba_mm.RandomErasing', erase_prob=1.0, mode='rand', fill_color=[128] * 3,
        fill_std=[30] * 3)])(dict(clips=clips))['clips'][0]
    assert ((clips > 0).any(-1) == (clips[0] > 0).any(-1)).all() and (clips > 0).any()
    assert (clips[0] != clips[1]).any()


def test_repeated_augmentation(make, path):
    """Views that are augmented anew, of the same frames, none of which is written into."""
    load = make('LoadClips', num_frames=2)
    results = load(dict(video_path=path, gt_label=1))
    before = results['clips'].copy()
    np.random.seed(0)
    repeated = make('RepeatClips', times=3, transforms=[dict(
        type='vmamba_mm.PerFrame', transforms=[dict(
            type='RandomErasing', erase_prob=1.0, mode='const', fill_color=[255] * 3)])])(results)
    assert repeated['clips'].shape == (3, *before.shape[1:]) and repeated['gt_label'] == 1
    assert len({view.tobytes() for view in repeated['clips']}) == 3
    assert (results['clips'] == before).all()
    with pytest.raises(ValueError, match='times must be an int of at least 1'):
        make('RepeatClips', times=0, transforms=[])


@pytest.mark.parametrize('height, width', [(16, 30), (31, 16), (16, 16)])
def test_three_crops(make, height, width):
    """Beginning, middle and end of the longer side."""
    places = np.indices((height, width)).transpose(1, 2, 0).astype(np.uint8)
    clips = np.broadcast_to(np.append(places, places[..., :1], -1), (2, 3, height, width, 3))
    clips = make('ThreeCrops', crop_size=16)(dict(clips=clips.copy()))['clips']
    assert clips.shape == (6, 3, 16, 16, 3)
    ends = (height - 16, width - 16)
    expected = [(0, 0), (ends[0] // 2, ends[1] // 2), ends]
    assert [tuple(clip[0, 0, 0, :2]) for clip in clips] == expected * 2


def test_crops_larger_than_the_frames(make):
    with pytest.raises(ValueError, match='crop_size=20.*larger than the frames, which are 30x16'):
        make('ThreeCrops', crop_size=20)(dict(clips=np.zeros((1, 2, 16, 30, 3), np.uint8)))


def test_pack(make, path):
    results = make('LoadClips', num_frames=4)(dict(video_path=path, gt_label=3, sample_idx=7))
    packed = make('PackClips')(results)
    inputs, sample = packed['inputs'], packed['data_samples']
    assert inputs.shape == (1, 3, 4, 24, 32) and inputs.dtype == torch.uint8
    assert (inputs.float().mean((0, 1, 3, 4)) / STEP).round().tolist() == [3, 9, 15, 21]
    assert sample.gt_label.tolist() == [3] and sample.video_path == path
    assert sample.total_frames == 24 and sample.img_shape == (24, 32)


def test_a_picture_of_a_clip(make, path):
    """What predict.py draws: the frames of the first view in rows."""
    from vmamba_mm.mm.hooks.data import load_image
    from vmamba_mm.mm.sources import VIDEO

    sheet = load_image([make('LoadClips', num_frames=5)], path, VIDEO)
    assert sheet.shape == (24 * 2 + 2, 32 * 3 + 2 * 2, 3)
    assert (sheet[24:26] == 255).all() and (sheet[26:, 2 * 34:] == 255).all()
    tiles = [sheet[y:y + 24, x:x + 32] for y in (0, 26) for x in (0, 34, 68)][:5]
    assert numbers(np.stack(tiles)) == [2, 7, 12, 16, 21]
