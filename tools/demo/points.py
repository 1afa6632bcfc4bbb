"""Clouds of points, from end to end: the set, training, accuracy, report, floors.

    python tools/demo/points.py        (make demo-points)

A small PointMamba tells 8 solids apart, of points on their surfaces with noise, turned about the
vertical axis, and with a side that was not seen. It is measured beside what the outline alone
tells. It calls the project's own tools/train.py and test.py, and stops with an error when the model
is below its floor.
"""
import time
from pathlib import Path

import numpy as np
import shapes
from PIL import Image, ImageDraw, ImageFont
from run import begin, cpu_seconds, evaluate, read_work_dir, say, show_page, train

from vmamba_mm.mm.points.draw import SIDE, blend, draw_points, seen

TITLE = 'Clouds of points: PointMamba, eight solids with noise, turned about the vertical axis'
CONFIG = 'configs/demo/pointmamba_shapes-256.py'
#: Accuracy in percent that is checked, with room below what the demo reaches.
FLOOR = 85.0
#: The least by which it must be above the nearest neighbours of outlines.
MARGIN = 10.0


# --- what the outline tells -----------------------------------------------------------------------

def outline(cloud):
    """How far a cloud (N, 3) reaches: up, and along and across its longer side from above."""
    cloud = cloud - cloud.mean(0)
    cloud = cloud / np.linalg.norm(cloud, axis=1).max()
    above = np.linalg.svd(cloud[:, [0, 2]], compute_uv=False) / np.sqrt(len(cloud))
    return np.array([cloud[:, 1].std(), *above])


def vote_of_neighbours(known, labels, queries, count=9):
    """The class of most of the nearest ones; (M, F) and (N, F) to (N)."""
    scale = known.std(0)
    apart = ((queries[:, None] - known[None]) / scale) ** 2
    nearest = labels[np.argsort(apart.sum(2), axis=1, kind='stable')[:, :count]]
    return np.array([np.bincount(row).argmax() for row in nearest])


def accuracy_of_outlines(root):
    """In percent, of the test set by the nearest of the training set."""
    features = {}
    for split in ('train', 'test'):
        names, labels = shapes.list_clouds(root, split)
        features[split] = np.stack([outline(shapes.read_cloud(root, n)) for n in names]), labels
    known, labels = features['train']
    queries, wanted = features['test']
    return 100 * np.mean(vote_of_neighbours(known, labels, queries) == wanted)


# --- the page -------------------------------------------------------------------------------------

def picture(title, colour='black'):
    page = Image.new('RGB', (SIDE, SIDE + 30), 'white')
    draw = ImageDraw.Draw(page)
    draw.text((6, SIDE + 2), title, colour, ImageFont.load_default(17))
    return page, draw


def draw_cloud(cloud, title, colour):
    """The points, coloured by their height, the far ones first and smaller."""
    page, draw = picture(title, colour)
    draw_points(draw, cloud)
    return page


def draw_order(cloud, centres, order, title):
    """The centres of the groups along a curve, from dark to light, among the points."""
    page, draw = picture(title)
    for x, y in seen(cloud)[0]:
        draw.ellipse([x - 1, y - 1, x + 1, y + 1], (190, 190, 190))
    place = seen(centres[order])[0]
    steps = np.linspace(0, 1, len(place))
    for start, end, share in zip(place[:-1], place[1:], steps, strict=False):
        draw.line([*start, *end], blend(share), 3)
    for (x, y), share in zip(place, steps, strict=True):
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], blend(share))
    return page


def load_model(checkpoint):
    from mmengine.runner import load_checkpoint

    from vmamba_mm.mm import cli
    from vmamba_mm.mm.loading import register

    register()
    model = cli.build_model(cli.load_config(CONFIG)).eval()
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    return model


def draw_pictures(model, root, folder, count=12):
    """Some of the clouds with what the model says, and the two orders of two of them.

    Returns:
        The share of the test set that each class is taken for, in percent (classes, classes).
    """
    import torch

    folder.mkdir()
    names, labels = shapes.list_clouds(root, 'test')
    clouds = [shapes.read_cloud(root, name).astype(np.float32) for name in names]
    found = []
    for begin_at in range(0, len(clouds), 50):
        with torch.no_grad():
            found += model.test_step(dict(inputs=[
                torch.from_numpy(cloud) for cloud in clouds[begin_at:begin_at + 50]]))
    predicted = np.array([int(sample.pred_label) for sample in found])
    table = np.zeros((len(shapes.CLASSES),) * 2)
    np.add.at(table, (labels, predicted), 1)
    # One of each class, and of the mistakes as many as there is room for.
    wrong = np.flatnonzero(predicted != labels)
    shown = [int(np.flatnonzero(labels == c)[0]) for c in range(len(shapes.CLASSES))]
    shown += [int(i) for i in wrong if i not in shown][:count - len(shown)]
    for i in shown:
        right, score = predicted[i] == labels[i], float(found[i].pred_score.max())
        text = f'{shapes.CLASSES[predicted[i]]} {100 * score:.0f} %'
        text += '' if right else f', is a {shapes.CLASSES[labels[i]]}'
        page = draw_cloud(clouds[i], text, (0, 110, 60) if right else (190, 20, 20))
        page.save(folder / f'{"1" if right else "2"}_{names[i]}.png')
    for c in (shapes.CLASSES.index('torus'), shapes.CLASSES.index('chair')):
        i = int(np.flatnonzero(labels == c)[0])
        with torch.no_grad():
            groups = model.backbone.group(torch.from_numpy(clouds[i])[None])
            orders = model.backbone.orders(groups.centres)[0].numpy()
        for order, curve in zip(orders, ('Hilbert curve', 'x and y swapped'), strict=True):
            draw_order(clouds[i], groups.centres[0].numpy(), order, f'groups, {curve}').save(
                folder / f'3_{names[i]}_{curve[0]}.png')
    return 100 * table / table.sum(1, keepdims=True)


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-points')
    start, root = time.time(), Path('data/demo/shapes')
    begin(TITLE, 'shapes', work_dir)
    seconds, checkpoint = train(CONFIG, work_dir)
    _, metrics = evaluate(CONFIG, checkpoint, work_dir)
    base = accuracy_of_outlines(root)
    table = draw_pictures(load_model(checkpoint), root, work_dir / 'predictions')

    accuracy, classes = metrics['accuracy'], shapes.CLASSES
    mixed = [(table[a, b], classes[a], classes[b]) for a in range(len(classes))
             for b in range(len(classes)) if a != b]
    most = ', '.join(f'{a} for {b} {share:.0f} %' for share, a, b in
                     sorted(mixed, reverse=True)[:3] if share)
    count = len(shapes.list_clouds(root, 'test')[0])
    lines = [f'accuracy {accuracy:.1f} % of {count} held-out clouds (floor {FLOOR:g} %, chance '
             f'{100 / len(classes):g} %)',
             f'{accuracy - base:.1f} points above {base:.1f} %, of the nearest neighbours of the '
             f'outline (floor {MARGIN:g} points)',
             f'taken most often: {most or "none for another"}']
    show_page(TITLE, lines, work_dir, columns=4)
    say(f'took {time.time() - start:.0f} s (training: {seconds:.0f} s; CPU time '
        f'{cpu_seconds():.0f} s)')
    if not accuracy >= max(FLOOR, base + MARGIN):
        raise SystemExit(f'[demo] FAILED: accuracy below {FLOOR:g} %, or less than {MARGIN:g} '
                         'points above the nearest neighbours')


if __name__ == '__main__':
    main()
