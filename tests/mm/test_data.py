"""Which file and which step of a pipeline failed, and what is called corrupt."""

import numpy as np
import pytest
from PIL import Image

from vmamba_mm.errors import UserError
from vmamba_mm.mm.hooks.data import SampleReader, apply_steps, load_image


class Load:
    """A loader of one's own: arrays, in one key of the sample."""

    def __call__(self, results):
        return {**results, 'img': np.load(results['img_path'])}


class Halve:
    def __call__(self, results):
        results['img'] //= 2
        return results


class NeedsTwoRows:
    def __call__(self, results):
        if len(results['img']) < 2:
            raise ValueError('two rows are needed')
        return results


class LoadAnnotations:
    def __call__(self, results):
        with Image.open(results['seg_map_path']) as image:
            results['labels'] = np.array(image)
        assert results['labels'].max() < 9, 'labels are below 9'
        return results


class Pack:
    def __call__(self, results):
        return dict(inputs=results['img'], data_samples=None)


@pytest.fixture(params=['repeated', 'joined'])
def dataset(mm, tmp_path, request):
    """Two sound samples and bad ones: too small, corrupt, missing; labels of both kinds."""
    from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
    from mmengine.dataset.base_dataset import Compose

    names = ('good', 'small', 'corrupt', 'missing', 'labels', 'high')
    for name in names:
        np.save(tmp_path / f'{name}.npy', np.full((1 if name == 'small' else 4, 5, 6), 8, np.uint8))
        Image.fromarray(np.full((4, 5), 9 * (name == 'high'), np.uint8)).save(
            tmp_path / f'{name}.png')
    (tmp_path / 'corrupt.npy').write_bytes(b'no array')
    (tmp_path / 'labels.png').write_bytes(b'no image')
    (tmp_path / 'missing.npy').unlink()

    class Data(BaseDataset):
        def load_data_list(self):
            return [dict(img_path=str(tmp_path / f'{name}.npy'),
                         seg_map_path=str(tmp_path / f'{name}.png')) for name in names]

    made = Data(test_mode=True)
    made.pipeline = Compose([])
    made.pipeline.transforms = [Load(), NeedsTwoRows(), LoadAnnotations(), Pack()]
    if request.param == 'joined':
        return ConcatDataset([made, made])
    return RepeatDataset(made, times=2)


@pytest.mark.parametrize(('index', 'corrupt', 'words'), [
    (1, False, ('small.npy', '5x1 pixels', 'step NeedsTwoRows', 'two rows are needed')),
    (2, True, ('corrupt.npy', 'Load')), (3, False, ('missing.npy', 'does not exist')),
    (4, True, ('labels.png', 'LoadAnnotations')),
    (5, False, ('high.npy', 'LoadAnnotations', 'labels are below 9'))])
def test_what_failed(dataset, index, corrupt, words):
    reader = SampleReader(dataset)
    assert reader([0])[0]['inputs'].shape == (4, 5, 6)
    with pytest.raises(UserError) as err:
        reader([0, index + 6])  # of the second time, or data set
    assert ('corrupt' in str(err.value)) == corrupt
    assert all(word in str(err.value) for word in words), err.value


def test_what_was_loaded(tmp_path):
    """As it was before later steps wrote into it."""
    path = tmp_path / 'a.npy'
    np.save(path, np.full((4, 5), 8))
    data, image = apply_steps([Load(), Halve(), Pack()], dict(img_path=str(path)))
    assert (image == 8).all() and (data['inputs'] == 4).all()
    np.testing.assert_array_equal(load_image([Load(), Halve()], path), image)
    assert apply_steps([Halve(), Pack()], dict(img=image.copy()))[1] is None
    with pytest.raises(UserError, match='no step that loads'):
        load_image([], path)


def test_a_package_that_is_missing_is_no_corrupt_file(tmp_path):
    def load(results):
        raise ImportError('no module named gdal')

    with pytest.raises(UserError, match='fails on the image a.tif: ImportError: .* gdal') as err:
        apply_steps([load], dict(img_path='a.tif'))
    assert 'corrupt' not in str(err.value)
