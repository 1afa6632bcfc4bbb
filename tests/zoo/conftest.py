"""Official files with random weights go through the tools and the inferencers.

The expected numbers come from the model whose weights were written to the file, before any name
was changed. Of each family one model, the smallest, has its full size; the others are on the meta
device (test_rows.py) or narrow.
"""

import pytest
from official import classifier_state, random_backbone, save_training_file, shared
from zoo_helpers import Dense

from vmamba_mm import zoo


@pytest.fixture
def run(call):
    """run(tool or script, ...) -> (stdout, stderr), on the CPU; ``fails`` tells the exit code."""

    def run(tool, *argv, fails=False):
        code, out, err = call(tool, *argv, env={'CUDA_VISIBLE_DEVICES': ''})
        assert (code != 0) == fails, f'{out[-2000:]}\n{err[-3000:]}'
        return out, err

    return run


@pytest.fixture
def big(tmp_path):
    """A folder for large files that pytest shall not keep."""
    yield tmp_path
    for path in tmp_path.rglob('*'):
        if path.is_file() and path.stat().st_size > 1 << 20:
            path.unlink()


@pytest.fixture
def strip(tmp_path):
    """An image whose shape keeps the full-size pipelines of the configs cheap."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((400, 20), Image.Resampling.BICUBIC).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


@pytest.fixture(scope='session')
def tiny_file(tmp_path_factory):
    """(official classification file of tiny_s2l5, the backbone, the state dict)."""
    model = random_backbone('tiny_s2l5', (3,))
    state = classifier_state(model)
    path = save_training_file(tmp_path_factory.mktemp('tiny') / 'vssm_tiny.pth', state)
    yield path, model, state
    path.unlink()


#: What a narrow model changes of a published one: its backbone, and its necks and heads.
NARROW = dict(embed_dims=16, depths=(1, 1, 2, 1))
CHANNELS, WIDTH = [16, 32, 64, 128], 64
HEADS = {
    'cls': dict(head=dict(in_channels=CHANNELS[-1])),
    'det': dict(
        neck=dict(in_channels=CHANNELS, out_channels=WIDTH),
        rpn_head=dict(in_channels=WIDTH, feat_channels=WIDTH),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=WIDTH),
                      mask_roi_extractor=dict(out_channels=WIDTH),
                      bbox_head=dict(in_channels=WIDTH, fc_out_channels=256),
                      mask_head=dict(in_channels=WIDTH, conv_out_channels=WIDTH))),
    'seg': dict(
        decode_head=dict(in_channels=CHANNELS, channels=WIDTH),
        auxiliary_head=dict(in_channels=CHANNELS[2], channels=WIDTH))}


@pytest.fixture(scope='session')
def narrow(tmp_path_factory):
    """narrow(task, base, **changes) -> (config, arch): a published recipe, on a narrow model."""
    folder = tmp_path_factory.mktemp('narrow')

    def narrow(task, base, **changes):
        published = zoo.entries('vmamba', base, task)[0].path
        arch = dict(base=base, **{**NARROW, **changes})
        model = dict(HEADS[task], backbone=dict(arch=dict(arch, _delete_=True)))
        path = folder / f'{task}-{base}{len(changes)}.py'
        path.write_text(f'_base_ = {str(published)!r}\nmodel = {model}\n')
        return path, arch

    return narrow


@pytest.fixture(scope='session')
def samples():
    """(folder, [(file name, class index)]): 25 photographs of as many classes."""
    root = shared('data/imagenet_samples')
    rows = [line.split() for line in (root / 'val.txt').read_text().splitlines()]
    return root, [(name, int(index)) for name, index in rows[::5]]


@pytest.fixture(scope='session')
def sample_labels(samples, tmp_path_factory):
    """The annotation file of those photographs."""
    path = tmp_path_factory.mktemp('samples') / 'val.txt'
    path.write_text(''.join(f'{name} {index}\n' for name, index in samples[1]))
    return path


@pytest.fixture(scope='session')
def dense(mm, narrow, tmp_path_factory):
    """dense(task) -> Dense, made when asked for."""
    made = {}

    def dense(task):
        pytest.importorskip({'det': 'mmdet', 'seg': 'mmseg'}[task])
        if task not in made:
            base = {'det': 'tiny_s2l5', 'seg': 'vanilla_tiny'}[task]
            made[task] = Dense(task, narrow(task, base)[0], tmp_path_factory.mktemp(task))
        return made[task]

    yield dense
    for one in made.values():
        one.file.unlink()
