"""Captions, from end to end: the set, two vision towers, training, answers, report, floors.

    python tools/demo/vlm.py        (make demo-vlm)

A small Cobra says which digits lie on a photograph, byte by byte: two towers, which are trained
here in place of those that others have trained, then a projector and a Mamba. It calls the
project's own tools/train.py, test.py and predict.py, and stops with an error when fewer digits are
named right on held-out pictures than its floor.
"""
import time
from pathlib import Path

import caption_towers
import captions
from run import begin, cpu_seconds, evaluate, read_work_dir, run, say, show_page, train

TITLE = 'Captions: Cobra, a Mamba that reads images, on digits on photographs'
CONFIG = 'configs/demo/cobra_captions-64.py'
TOWERS = Path('work_dirs/demo-vlm-towers')  # where the config names them
#: Digits named right, in percent, with room below what the demo reaches.
FLOOR = 80.0
SHOWN = 12


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-vlm')
    start, root = time.time(), Path('data/demo/captions')
    begin(TITLE, 'captions', work_dir)
    accuracy, seconds = caption_towers.train(root, TOWERS)
    say(f'towers: {accuracy:.1f} % of the held-out patches with a digit, {seconds:.0f} s')
    spent, checkpoint = train(CONFIG, work_dir)
    _, metrics = evaluate(CONFIG, checkpoint, work_dir)
    _, items = captions.read(root, 'val')
    images = [root / item['image'] for item in items[::len(items) // SHOWN][:SHOWN]]
    run('predict', work_dir / 'predict.log', 'tools/predict.py', CONFIG, checkpoint, *images,
        '--ask', captions.QUESTION, '--out-dir', work_dir / 'predictions')
    lines = [f'digits named right: {metrics["named"]:.1f} % on {len(items)} held-out pictures '
             f'(floor {FLOOR:g} %, chance about 10 %)',
             f'whole captions right: {metrics["exact"]:.1f} %',
             f'towers alone, patches with a digit: {accuracy:.1f} %']
    show_page(TITLE, lines, work_dir, columns=4)
    say(f'took {time.time() - start:.0f} s (towers: {seconds:.0f} s, training: {spent:.0f} s; CPU '
        f'time {cpu_seconds():.0f} s and that of the towers)')
    if not metrics['named'] >= FLOOR:
        raise SystemExit(f'[demo] FAILED: fewer than {FLOOR:g} % of the digits are named right')


if __name__ == '__main__':
    main()
