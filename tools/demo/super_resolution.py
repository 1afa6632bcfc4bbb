"""Super-resolution by 2, from end to end: photographs, training, PSNR, report, floor.

    python tools/demo/super_resolution.py        (make demo-sr)

A small MambaIR learns from eight photographs of pip packages, and is measured on two others beside
bicubic interpolation. It calls the project's own tools/train.py, test.py and predict.py, and stops
with an error when the model is not far enough above bicubic.
"""
import time
from pathlib import Path

import numpy as np
import photographs
import report
import torch
from PIL import Image
from run import begin, cpu_seconds, evaluate, read_work_dir, run, say, show_page, train

from vmamba_mm.mm.restoration.images import resize
from vmamba_mm.mm.restoration.metrics import compare

TITLE = 'Super-resolution by 2: MambaIR on photographs that it has not seen'
CONFIG = 'configs/demo/mambair_photographs-x2.py'
#: The least by which PSNR must be above that of bicubic, in dB.
MARGIN = 0.3
#: Side of the part that the report shows enlarged, and by how much.
PART, ENLARGED = 72, 4


def bicubic(small):
    """A photograph (H, W, 3) uint8, twice as large."""
    size = [photographs.SCALE * side for side in small.shape[:2]]
    return (resize(small / 255, size).clip(0, 1) * 255).round().astype(np.uint8)


def score(image, target):
    """PSNR and SSIM on the luma, of photographs (H, W, 3) uint8."""
    image, target = (torch.from_numpy(a.copy()).permute(2, 0, 1) for a in (image, target))
    return compare(image, target, photographs.SCALE, on_luma=True)


def busiest(target, blurred):
    """The corner of the square in which bicubic loses most."""
    lost = np.square(target.astype(float) - blurred).mean(-1)
    sums = np.pad(lost.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = (sums[PART:, PART:] - sums[:-PART, PART:] - sums[PART:, :-PART]
               + sums[:-PART, :-PART])
    return np.unravel_index(windows.argmax(), windows.shape)


def draw(name, images, scores, path):
    """The same square of each image, enlarged, with its PSNR below.

    Args:
        name: of the photograph.
        images: by title: 'small', 'bicubic', 'MambaIR' and 'original', of the original's size.
        scores: PSNR by title, of the ones that have any.
        path: of the picture.
    """
    top, left = busiest(images['original'], images['bicubic'])
    panels = []
    for title, image in images.items():
        part = image[top:top + PART, left:left + PART]
        text = f'{title}, {scores[title]:.2f} dB' if title in scores else title
        panels.append(report.panel(part, np.zeros(part.shape[:2]), {}, text, ENLARGED))
    report.side_by_side(panels).save(path)


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-sr')
    start, root = time.time(), Path('data/demo/photographs')
    begin(TITLE, 'photographs', work_dir)
    seconds, checkpoint = train(CONFIG, work_dir)
    _, metrics = evaluate(CONFIG, checkpoint, work_dir)

    names = photographs.list_names(root, 'val')
    restored, pictures = work_dir / 'restored', work_dir / 'predictions'
    run('predict', work_dir / 'predict.log', 'tools/predict.py', CONFIG, checkpoint,
        *(root / 'val/LR' / f'{name}x2.png' for name in names), '--out-dir', restored)
    pictures.mkdir()
    base = []
    for name in names:
        large, small = photographs.read_pair(root, 'val', name)
        images = dict(small=small.repeat(2, 0).repeat(2, 1), bicubic=bicubic(small),
                      MambaIR=np.asarray(Image.open(restored / f'{name}x2.png')), original=large)
        base.append(score(images['bicubic'], large))
        draw(name, images, dict(bicubic=base[-1][0], MambaIR=score(images['MambaIR'], large)[0]),
             pictures / f'{name}.png')
    psnr, ssim = np.mean(base, axis=0)
    gain = metrics['psnr'] - psnr
    lines = [f'PSNR {metrics["psnr"]:.2f} dB and SSIM {metrics["ssim"]:.4f} of {len(names)} '
             'held-out photographs, on the luma',
             f'{gain:.2f} dB above bicubic, {psnr:.2f} dB and {ssim:.4f} (floor {MARGIN:g} dB)',
             'Below: where bicubic loses most. Eight photographs teach little beside the 3450 of '
             'DF2K.']
    show_page(TITLE, lines, work_dir, columns=1)
    say(f'took {time.time() - start:.0f} s (training: {seconds:.0f} s; CPU time '
        f'{cpu_seconds():.0f} s)')
    if not gain >= MARGIN:
        raise SystemExit(f'[demo] FAILED: less than {MARGIN:g} dB above bicubic')


if __name__ == '__main__':
    main()
