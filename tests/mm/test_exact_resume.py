import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vmamba_mm.errors import UserError
from vmamba_mm.mm.hooks.data import SampleReader, check_dataset, install_reader
from vmamba_mm.mm.hooks.exact_resume import EndlessBatches, EndlessIterator, NumberedBatches


class Noise(Dataset):
    """Draws from each generator that augmentations use."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        import random
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


class Shuffle:
    """Another order in every epoch, like mmengine's DefaultSampler."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 10

    def __iter__(self):
        return iter(torch.randperm(10, generator=torch.Generator().manual_seed(self.epoch)))


def make(kind, workers=0, seed=1, iteration=0, skip=0):
    loader = DataLoader(Noise(), batch_size=4, sampler=Shuffle(), num_workers=workers,
                        collate_fn=list)
    assert install_reader(loader)
    batches = kind(loader.batch_sampler, seed)
    batches.iteration, batches.skip = iteration, skip
    vars(loader)['batch_sampler'] = batches
    return loader


def read(loader, count=None):
    iterator = iter(loader)
    batches = list(iterator) if count is None else [next(iterator) for _ in range(count)]
    return [[(int(i), *noise) for i, *noise in batch] for batch in batches]


def test_noise_depends_on_the_place_alone():
    one = read(make(NumberedBatches, workers=0))
    np.random.seed(3)
    assert read(make(NumberedBatches, workers=2)) == one
    assert len(one) == len(make(NumberedBatches)) == 3
    noise = {x for batch in one for sample in batch for x in sample[1:]}
    assert len(noise) == 30
    for other in (dict(seed=2), dict(iteration=3)):
        again = {x for batch in read(make(NumberedBatches, **other)) for s in batch
                 for x in s[1:]}
        assert not noise & again


@pytest.mark.parametrize('done', [1, 2, 3])
def test_begins_within_an_epoch(done):
    assert read(make(NumberedBatches, iteration=done, skip=done)) == read(
        make(NumberedBatches))[done:]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('done', [1, 3, 7])
def test_endless_batches_begin_anywhere(done, workers):
    straight = read(make(EndlessBatches), 9)
    assert read(make(EndlessBatches, workers, iteration=done), 9 - done) == straight[done:]
    assert [i for i, *_ in straight[0]] != [i for i, *_ in straight[3]]  # the epochs differ


@pytest.mark.parametrize('upstream', [False, True])
def test_both_loops_find_their_place(upstream):
    """onedl's loop calls skip_iter, upstream's calls next for every step that was done."""
    loader = make(EndlessBatches, iteration=5)
    iterator = EndlessIterator(loader, replayed=5 if upstream else 0)
    if upstream:
        for _ in range(5):
            assert next(iterator) is None
    else:
        iterator.skip_iter(5)
    samples = [(int(i), *noise) for i, *noise in next(iterator)]
    assert samples == read(make(EndlessBatches), 6)[5]


def test_batches_of_one_shape_keep_their_numbers():
    """mmdet's sampler that sorts images into tall and wide ones."""
    pytest.importorskip('mmdet')
    from mmdet.datasets import AspectRatioBatchSampler

    class Boxes(Noise):
        def get_data_info(self, index):
            return dict(width=2, height=1 + 2 * (int(index) % 2))

    dataset = Boxes()
    sampler = torch.utils.data.SequentialSampler(dataset)
    sampler.dataset = dataset
    numbered = NumberedBatches(AspectRatioBatchSampler(sampler, batch_size=2), seed=0)
    drawn = list(numbered)
    assert [[i for i, _ in batch] for batch in drawn][:2] == [[0, 2], [1, 3]]
    words = [w for batch in drawn for _, w in batch]
    assert len(set(words)) == 10
    assert numbered.sampler is sampler


def test_batches_can_be_pickled():
    """Workers that are spawned, not forked, get the data set by pickle."""
    dataset = Noise()
    dataset.__getitems__ = SampleReader(dataset)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.__getitems__([(1, (1, 2))]) == dataset.__getitems__([(1, (1, 2))])
    numbered = pickle.loads(pickle.dumps(NumberedBatches(BatchSampler(range(4), 2, False), 0)))
    assert len(list(numbered)) == 2


def test_empty_data_set():
    with pytest.raises(UserError, match='no images'):
        check_dataset([])
