"""Multi-query associative recall: the generator of Zoology (arXiv 2312.04927, section 4 and E).

An example is a list of key-value pairs, and then each key once more, at places that are drawn. At
such a query the model has to give the value that stood behind the key:

    inputs   2  8  4  7  .  .  4  .  .  .  .  .  2  .  .  .
    labels   .  .  .  .  .  .  7  .  .  .  .  .  8  .  .  .

The numbers that numpy draws, and their order, are those of the public code (HazyResearch/zoology,
``multiquery_ar``), so one seed gives the same keys, values and places there and here.
"""

import multiprocessing
import os
from typing import NamedTuple

import numpy as np

IGNORED = -100  # the label of every position that is no query
FILLER = 0
MANY = 50_000  # examples, of which processes draw a part each


class Segment(NamedTuple):
    """Examples of one number of pairs, as the training reads them; (n, ...) int64 tensors.

    The queries of an example stand in the order of their places.
    """

    inputs: object  #: (n, L)
    positions: object  #: (n, K), where the queries are
    values: object  #: (n, K), the right answers
    pairs: int  #: K

    def to(self, device):
        return Segment(*(t.to(device) for t in self[:3]), self.pairs)


def arrange(keys, values, slots, length):
    """Inputs and labels of drawn keys, values and places, before any noise.

    Args:
        keys, values: (n, K).
        slots: (n, K), the place of each key: slot i is position 2 K + 2 i.
        length: L.

    Returns:
        inputs (n, L), 0 where nothing stands, and labels (n, L), IGNORED where nothing is asked.
    """
    count, pairs = keys.shape
    inputs = np.full((count, length), FILLER, np.int64)
    labels = np.full((count, length), IGNORED, np.int64)
    inputs[:, 0:2 * pairs:2], inputs[:, 1:2 * pairs:2] = keys, values
    positions = 2 * pairs + 2 * slots
    np.put_along_axis(inputs, positions, keys, 1)
    np.put_along_axis(labels, positions, values, 1)
    return inputs, labels


def gap_probabilities(slots, power_a):
    """Of each slot to be the first that is drawn: about 1/i for a small ``power_a``."""
    weights = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    return weights / weights.sum()


def multiquery_ar(vocab_size, num_examples, input_seq_len, seed, power_a=0.01, num_kv_pairs=8,
                  random_non_queries=True, generator=None):
    """Examples of the task.

    Args:
        vocab_size: V, more than L. Keys are of 1 to V/2 - 1 and values of V/2 to V - 1; none of
            them occurs twice among the pairs of an example.
        num_examples: n.
        input_seq_len: L, even, at least 4 K.
        seed: of numpy's generator, which draws all but the noise.
        power_a: of the power law of the places. 0.01 puts most queries close to the pairs, 1 makes
            all places alike.
        num_kv_pairs: K.
        random_non_queries: whether tokens drawn from all of the vocabulary fill the places
            between the queries; else 0 does.
        generator: torch's, for that noise. None is torch's global one, as in the public code.

    Returns:
        inputs and labels, (n, L) int64 tensors. A label stands at the position of the query
        itself and is the value that has to follow; all others are -100.

    Raises:
        ValueError: on sizes that do not fit.
    """
    import torch

    if input_seq_len % 2:
        raise ValueError(f'input_seq_len must be even, not {input_seq_len}')
    if vocab_size <= input_seq_len:
        raise ValueError(f'vocab_size must be above input_seq_len ({input_seq_len}), not '
                         f'{vocab_size}')
    if not 1 <= num_kv_pairs <= input_seq_len // 4:
        raise ValueError(f'num_kv_pairs must be 1 to {input_seq_len // 4}, a quarter of '
                         f'input_seq_len, not {num_kv_pairs}')
    rng, half = np.random.RandomState(seed), vocab_size // 2
    keys = np.stack([1 + rng.permutation(half - 1)[:num_kv_pairs] for _ in range(num_examples)])
    values = np.stack([half + rng.permutation(vocab_size - half)[:num_kv_pairs]
                       for _ in range(num_examples)])
    slots = input_seq_len // 2 - num_kv_pairs
    p = gap_probabilities(slots, power_a)
    places = np.stack([rng.choice(slots, num_kv_pairs, replace=False, p=p)
                       for _ in range(num_examples)])
    inputs, labels = map(torch.from_numpy, arrange(keys, values, places, input_seq_len))
    if random_non_queries:
        noise = torch.randint(vocab_size, inputs.shape, generator=generator)
        inputs = torch.where(inputs == FILLER, noise, inputs)
    return inputs, labels


def find_queries(labels):
    """(positions, values) of labels (n, L): both (n, K), from left to right."""
    count = len(labels)
    positions = (labels != IGNORED).nonzero()[:, 1].view(count, -1)
    return positions, labels.gather(1, positions)


def segment_seeds(seed, train, test):
    """The seeds of the segments of training and test, which are of disjoint ranges."""
    rng = np.random.RandomState(seed)
    return ([int(s) for s in rng.randint(0, 2**31, size=train, dtype=np.int64)],
            [int(s) for s in rng.randint(2**31, 2**32, size=test, dtype=np.int64)])


def make_segments(setting, seed):
    """(segments of training, segments of test) of a setting, one for each number of pairs.

    The test has one segment, of the most pairs. Many examples are drawn by several processes.

    Args:
        setting: with vocab_size, length, pairs, examples, test_examples, power_a, filler.
        seed: of the data.
    """
    import torch

    pairs = sorted(setting['pairs'])
    train, test = segment_seeds(seed, len(pairs), 1)
    wanted = [(setting, count, segment_seed, examples) for count, segment_seed, examples in zip(
        (*pairs, pairs[-1]), train + test,
        (*[setting['examples']] * len(pairs), setting['test_examples']), strict=True)]
    if sum(examples for *_, examples in wanted) < MANY:
        drawn = [_draw(*what) for what in wanted]
    else:
        with multiprocessing.get_context('spawn').Pool(min(len(wanted), os.cpu_count())) as pool:
            drawn = pool.starmap(_draw, wanted)
    segments = [Segment(*map(torch.from_numpy, arrays), count)
                for arrays, (_, count, *_) in zip(drawn, wanted, strict=True)]
    return segments[:-1], segments[-1:]


def _draw(setting, pairs, seed, examples):
    """Arrays of a segment, which travel from a process more simply than tensors."""
    import torch

    inputs, labels = multiquery_ar(
        setting['vocab_size'], examples, setting['length'], seed, power_a=setting['power_a'],
        num_kv_pairs=pairs, random_non_queries=setting['filler'] == 'random',
        generator=torch.Generator().manual_seed(seed))
    return [t.numpy() for t in (inputs, *find_queries(labels))]
