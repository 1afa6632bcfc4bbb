"""Changes between two dates, from end to end: the set, training, F1, report, floors.

    python tools/demo/change.py        (make demo-change)

A small RSM-CD finds the roofs that came or went between two photographs of one ground, in mmseg.
It is measured beside the best threshold on the difference of the two. It calls the project's own
tools/train.py, test.py and predict.py, and stops with an error when the model is below its floor.
"""
import time
from pathlib import Path

import numpy as np
import pairs
import report
import thresholds
from PIL import Image
from run import begin, cpu_seconds, evaluate, read_work_dir, run, say, show_page, train
from scipy import ndimage

TITLE = 'Change detection: RSM-CD, roofs that came or went between two photographs'
CONFIG = 'configs/demo/rsm-cd_pairs-96.py'
#: F1 in percent that is checked, with room below what the demo reaches.
FLOOR = 60.0
#: The least by which it must be above the best threshold.
MARGIN = 15.0
COLOURS = {1: (213, 94, 0)}
BINS = np.array([*range(200), np.inf])


def difference(first, second):
    """How far two images (H, W, 3) are apart in each pixel, in the light of the first.

    Of the three colours it is the largest one; it is smoothed, as a shift and noise ask for it.
    Without either the best threshold is worse.
    """
    first, second = first.astype(float), second.astype(float)
    scale = first.std((0, 1)) / np.maximum(second.std((0, 1)), 1)
    second = (second - second.mean((0, 1))) * scale + first.mean((0, 1))
    return ndimage.gaussian_filter(np.abs(first - second).max(-1), 1)


def differences(root, split):
    """Those of all pairs of a split, and what changed: both (N, H, W)."""
    found = [pairs.read_pair(root, split, name) for name in pairs.list_pairs(root, split)]
    return (np.stack([difference(first, second) for first, second, _ in found]),
            np.stack([mask for *_, mask in found]))


def f1(pred, mask):
    """In percent, over all pixels."""
    return 200 * np.sum(pred & mask) / max(1, np.sum(pred) + np.sum(mask))


def draw(root, names, checkpoint, limits, work_dir):
    """For each pair what predict.py draws, the truth and what is beyond the threshold."""
    drawn, folder = work_dir / 'drawn', work_dir / 'predictions'
    files = {side: [root / 'val' / side / name for name in names] for side in 'AB'}
    run('predict', work_dir / 'predict.log', 'tools/predict.py', CONFIG, checkpoint, *files['A'],
        '--after', *files['B'], '--out-dir', drawn)
    folder.mkdir()
    for name in names:
        first, second, mask = pairs.read_pair(root, 'val', name)
        found = thresholds.within(difference(first, second), limits)
        report.side_by_side([Image.open(drawn / name).convert('RGB'),
                             report.panel(second, mask, COLOURS, 'truth'),
                             report.panel(second, found, COLOURS, 'best threshold')]
                            ).save(folder / name)


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-change')
    start, root = time.time(), Path('data/demo/pairs')
    begin(TITLE, 'pairs', work_dir)
    seconds, checkpoint = train(CONFIG, work_dir)
    _, metrics = evaluate(CONFIG, checkpoint, work_dir)

    limits = thresholds.best_range(*differences(root, 'train'), BINS)
    apart, masks = differences(root, 'val')
    base = f1(thresholds.within(apart, limits), masks)
    draw(root, pairs.list_pairs(root, 'val')[::20], checkpoint, limits, work_dir)
    others = ', '.join(f'{key} {metrics[key]:.1f}' for key in ('Precision', 'Recall', 'IoU'))
    lines = [f'F1 {metrics["F1"]:.1f} of what changed in {len(masks)} held-out pairs '
             f'(floor {FLOOR:g}); {others}',
             f'{metrics["F1"] - base:.1f} points above {base:.1f}, of the best threshold on the '
             f'difference of the two dates in the same light (floor {MARGIN:g} points)']
    show_page(TITLE, lines, work_dir, columns=1)
    say(f'took {time.time() - start:.0f} s (training: {seconds:.0f} s; CPU time '
        f'{cpu_seconds():.0f} s)')
    if not metrics['F1'] >= max(FLOOR, base + MARGIN):
        raise SystemExit(f'[demo] FAILED: F1 below {FLOOR:g}, or less than {MARGIN:g} points above '
                         'the best threshold')


if __name__ == '__main__':
    main()
