"""The demos' models in other runtimes: export them, and compare results on the held-out images.

`make demo`, `make demo-det` and `make demo-seg` train them first.
"""

import argparse
from pathlib import Path

import torch

from vmamba_mm.errors import UserError
from vmamba_mm.integrations.export import TARGETS, export_model
from vmamba_mm.integrations.export.substitute import run_by
from vmamba_mm.mm import cli
from vmamba_mm.mm.inputs import build_trained

#: The demo: its config, and the side of its images.
DEMOS = {'cls': ('configs/demo/vmamba_digits-48.py', 48),
         'det': ('configs/demo/mask-rcnn_vmamba_digits-128.py', 128),
         'seg': ('configs/demo/upernet_vmamba_digits-128.py', 128)}


def classes_equal(a, b):
    return float(a.pred_label.item() == b.pred_label.item())


def boxes_equal(a, b, tolerance=0.05):
    """Whether there are the same objects: classes, boxes to a part of a pixel, and masks but for a
    pixel in a hundred at their borders."""
    a, b = a.pred_instances, b.pred_instances
    if len(a) != len(b) or not torch.equal(a.labels, b.labels):
        return 0.0
    if not len(a):
        return 1.0
    near = (a.bboxes - b.bboxes).abs().max() <= tolerance
    masks = (torch.as_tensor(a.masks) != torch.as_tensor(b.masks)).float().mean() <= 1e-2
    return float(near and masks)


def pixels_equal(a, b):
    return (a.pred_sem_seg.data == b.pred_sem_seg.data).float().mean().item()


EQUAL = {'cls': ('images of the same class', classes_equal),
         'det': ('images with the same boxes and masks', boxes_equal),
         'seg': ('pixels of the same class', pixels_equal)}


def find_checkpoint(folder):
    files = sorted(folder.glob('*.pth'), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f'{folder} has no checkpoint: run the demo first, as make help says')
    return files[-1]


def compare(task, to, work_dirs, out_dir, most):
    """A line of the table."""
    from mmengine.runner import Runner

    path, side = DEMOS[task]
    checkpoint = find_checkpoint(work_dirs / f'demo-{task}')
    cfg = cli.load_config(path)
    from vmamba_mm.checkpoints.files import read_checkpoint

    model = build_trained(cfg, read_checkpoint(str(checkpoint)), str(checkpoint), 'cpu')
    file = out_dir / f'{task}{TARGETS[to].suffix}'
    report = export_model(model, to, file, size=(side, side),
                          is_dynamic=not TARGETS[to].is_fixed)
    if not report.is_right:
        raise UserError(f'{file}: ' + '; '.join(report.lines()))
    other = run_by(model, TARGETS[to].load(file))
    cfg.test_dataloader.num_workers, cfg.test_dataloader.batch_size = 0, 1
    cfg.test_dataloader.persistent_workers = False
    words, equal = EQUAL[task]
    shares, right = [], []
    with torch.no_grad():
        for data in Runner.build_dataloader(cfg.test_dataloader):
            found, expected = other.test_step(data), model.test_step(data)
            shares += [equal(a, b) for a, b in zip(found, expected, strict=True)]
            if task == 'cls':
                right += [[s.pred_label.item() == s.gt_label.item() for s in samples]
                          for samples in (found, expected)]
            if len(shares) >= most:
                break
    accuracy = ''
    if right:
        of_file, of_model = (100 * sum(map(sum, right[i::2])) / len(shares) for i in (0, 1))
        accuracy = f'; top-1 {of_file:.1f} %, of the model {of_model:.1f} %'
    print(f'| {task} | {to} | {max(report.errors.values()):.0e} | {report.ms:.1f} | '
          f'{report.eager_ms:.1f} | {100 * sum(shares) / len(shares):.2f} % of {len(shares)}: '
          f'{words}{accuracy} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--tasks', nargs='+', choices=DEMOS, default=list(DEMOS))
    parser.add_argument('--to', nargs='+', choices=TARGETS, default=['onnx', 'openvino', 'pt2'])
    parser.add_argument('--work-dirs', type=Path, default=Path('work_dirs'))
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/exported'))
    parser.add_argument('--images', type=int, default=200, help='to compare by (default: 200)')
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    print('| Demo | Runtime | Largest error | ms | Eager, ms | Equal |\n|---|---|---|---|---|---|')
    for task in args.tasks:
        for to in args.to:
            compare(task, to, args.work_dirs, args.out_dir, args.images)


if __name__ == '__main__':
    cli.run(main)
