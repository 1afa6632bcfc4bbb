"""What one number of each pixel tells without training: the baseline of demos."""
import numpy as np


def best_range(values, truth, bins):
    """The range of the values that has the best Dice, which is F1, of what is true.

    Args:
        values: numbers, of any shape.
        truth: of the same shape, in bool.
        bins: increasing edges; the range is from one to another, the upper one excluded.
    """
    held, own = (np.cumsum(np.concatenate([[0], np.histogram(v, bins)[0]]))
                 for v in (values, values[truth]))
    hits, held = (np.triu(counts[None] - counts[:, None]) for counts in (own, held))
    low, high = np.unravel_index(np.argmax(2 * hits / (held + own[-1])), hits.shape)
    return bins[low], bins[high]


def within(values, limits):
    return (values >= limits[0]) & (values < limits[1])
