"""How good answers are."""

import re
from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric

from vmamba_mm.registry import METRICS


@METRICS.register_module()
class AnswerAccuracy(BaseMetric):
    """Answers that are the true ones, in percent.

    ``exact`` of all that have the same words, whatever their capitals and stops. With ``words``,
    such as names of things in a picture, ``named``: of the words of the true answers that are in
    the list, those that the answer has in their place, where one too many counts as wrong.

    Args:
        words: the list.
    """

    def __init__(self, words: Sequence[str] = (), collect_device: str = 'cpu',
                 prefix: str | None = None):
        super().__init__(collect_device, prefix)
        self.words = {word.lower() for word in words}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            wanted, found = map(words_of, (sample['turns'][-1][1], sample['pred_text']))
            named = [[word for word in text if word in self.words] for text in (wanted, found)]
            self.results.append((wanted == found, *count_named(*named)))

    def compute_metrics(self, results: list[tuple[bool, int, int]]) -> dict[str, float]:
        exact, right, total = zip(*results, strict=True)
        metrics = dict(exact=100 * sum(exact) / len(exact))
        if self.words:
            metrics['named'] = 100 * sum(right) / max(sum(total), 1)
        return metrics


def words_of(text: str) -> list[str]:
    """The words of a text in small letters."""
    return re.findall(r'\w+', text.lower())


def count_named(wanted: Sequence[str], found: Sequence[str]) -> tuple[int, int]:
    """How many of ``found`` are in their place, and the longer of both lengths."""
    right = sum(a == b for a, b in zip(wanted, found, strict=False))
    return right, max(len(wanted), len(found))
