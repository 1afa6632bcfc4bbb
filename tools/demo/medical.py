"""Two models on the same made-up heads, from end to end: the set, training, Dice, report, floors.

    python tools/demo/medical.py        (make demo-medical)

A VM-UNet segments axial slices in mmseg, a SegMamba whole volumes with MONAI. Both are measured on
the same held-out heads, voxel by voxel, beside what brightness alone tells. It calls the project's
own tools/train.py, and stops with an error when a model is below its floor.
"""
import time
from pathlib import Path

import numpy as np
import report
import thresholds
import volumes
from PIL import Image
from run import begin, cpu_seconds, read_work_dir, say, show_page, train

TITLE = 'Medicine: ventricles and tumours in made-up heads, by slices and by volumes'
CONFIGS = {'VM-UNet, slices': 'configs/demo/vm-unet_slices-64.py',
           'SegMamba, volumes': 'configs/demo/segmamba_heads-32.py'}
#: Mean Dice of both classes that CI checks, with room below what the demo reaches.
FLOORS = {'VM-UNet, slices': 0.5, 'SegMamba, volumes': 0.75}
#: The least by which either must be above the best thresholds.
MARGIN = 0.3
COLOURS = {1: (0, 130, 200), 2: (230, 25, 75)}
BINS = np.linspace(-0.2, 1.6, 91)


def dice(pred, mask):
    """Of every class but the background."""
    return {name: 2 * np.sum((pred == c) & (mask == c)) / max(1, np.sum(pred == c)
                                                             + np.sum(mask == c))
            for c, name in enumerate(volumes.CLASSES) if c}


# --- what brightness tells ------------------------------------------------------------------------

def best_thresholds(cases):
    """For each class the range of brightness that has the best Dice on all voxels of the cases."""
    heads = [volumes.read_head(case) for case in cases]
    values, masks = (np.concatenate([head[i].ravel() for head in heads]) for i in (0, 1))
    return {c: thresholds.best_range(values, masks == c, BINS) for c in COLOURS}


def threshold(volume, ranges):
    pred = np.zeros(volume.shape, np.uint8)
    for c, limits in ranges.items():
        pred[thresholds.within(volume, limits)] = c
    return pred


# --- models ---------------------------------------------------------------------------------------

def load_model(config, checkpoint):
    from mmengine.runner import load_checkpoint

    from vmamba_mm.mm import cli
    from vmamba_mm.mm.loading import register

    register()
    cfg = cli.load_config(config)
    model = cli.build_model(cfg).eval()
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    return cfg, model


def by_slices(model, volume):
    """The labels of a volume (X, Y, Z), slice by slice."""
    import torch
    from mmseg.structures import SegDataSample

    images = [np.stack([volumes.slice_image(volume, z)] * 3) for z in range(volume.shape[2])]
    info = dict(img_shape=images[0].shape[1:], ori_shape=images[0].shape[1:])
    with torch.no_grad():
        samples = model.test_step(dict(
            inputs=[torch.from_numpy(image) for image in images],
            data_samples=[SegDataSample(metainfo=info) for _ in images]))
    labels = [sample.pred_sem_seg.data[0].cpu().numpy() for sample in samples]
    return np.stack(labels, axis=-1).transpose(1, 0, 2)


def by_volume(cfg, model):
    """{case: its labels (X, Y, Z)} of the held-out heads."""
    import torch
    from mmengine.registry import DATASETS

    dataset, found = DATASETS.build(cfg.test_dataloader.dataset), {}
    for sample in dataset:
        with torch.no_grad():
            result, = model.test_step({key: [value] for key, value in sample.items()})
        found[result.case] = result.pred.cpu().numpy().transpose(2, 1, 0)
    return found


# --- the page -------------------------------------------------------------------------------------

def panel(volume, labels, z, title):
    """An axial slice, classes in colour, with a title below."""
    image = np.stack([volumes.slice_image(volume, z)] * 3, -1)
    return report.panel(image, labels[:, :, z].T, COLOURS, title)


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-medical')
    start, root = time.time(), Path('data/demo/heads')
    begin(TITLE, 'heads', work_dir)
    seconds, models, curves = {}, {}, []
    for name, config in CONFIGS.items():
        folder = work_dir / Path(config).stem
        seconds[name], checkpoint = train(config, folder, f'train {name}')
        models[name] = load_model(config, checkpoint)
        curves.append(Image.open(folder / 'curves.png').convert('RGB'))
    report.side_by_side(curves, vertical=True).save(work_dir / 'curves.png')

    heads, held_out = (sorted((root / split).iterdir()) for split in ('train', 'val'))
    slices, whole = CONFIGS
    ranges, of_volumes = best_thresholds(heads), by_volume(*models[whole])
    scores, pictures = {name: [] for name in ('thresholds', *CONFIGS)}, work_dir / 'predictions'
    pictures.mkdir()
    for case in held_out:
        volume, mask = volumes.read_head(case)
        found = {'thresholds': threshold(volume, ranges),
                 slices: by_slices(models[slices][1], volume), whole: of_volumes[case.name]}
        for name, pred in found.items():
            scores[name].append(dice(pred, mask))
        z = int(np.argmax((mask == 2).sum((0, 1))))
        panels = [panel(volume, np.zeros_like(mask), z, case.name), panel(volume, mask, z, 'mask')]
        panels += [panel(volume, pred, z, name) for name, pred in found.items()]
        report.side_by_side(panels).save(pictures / f'{case.name}.png')

    means = {name: {c: np.mean([score[c] for score in cases]) for c in cases[0]}
             for name, cases in scores.items()}
    dices = {name: np.mean(list(by_class.values())) for name, by_class in means.items()}
    lines = []
    for name, by_class in means.items():
        shown = ', '.join(f'{c} {value:.3f}' for c, value in by_class.items())
        floor = f' (floor {FLOORS[name]:g})' if name in FLOORS else ', the best on the train heads'
        lines.append(f'{name}: mean Dice {dices[name]:.3f} of {len(held_out)} held-out heads'
                     f'{floor}: {shown}')
    low = [name for name, floor in FLOORS.items()
           if not dices[name] >= max(floor, dices['thresholds'] + MARGIN)]
    show_page(TITLE, lines, work_dir)
    spent = ', '.join(f'{name} {value:.0f} s' for name, value in seconds.items())
    say(f'took {time.time() - start:.0f} s (training: {spent}; CPU time {cpu_seconds():.0f} s)')
    if low:
        raise SystemExit(f'[demo] FAILED: below the floor, or less than {MARGIN:g} above '
                         f'thresholds: {", ".join(low)}')


if __name__ == '__main__':
    main()
