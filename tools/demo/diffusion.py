"""Digits made of noise, from end to end: the set, training, samples, report, floor.

    python tools/demo/diffusion.py        (make demo-diffusion)

A small DiS learns to make digits of a class that is asked for. It trains by the project's own
tools/train.py, is saved as a pipeline of diffusers, and read again to make new digits. A classifier
that has seen real digits alone says of which class they are; the demo stops with an error where
that is too seldom the class that was asked for.
"""
import time
from pathlib import Path

import numpy as np
import report
import scenes
import small_digits
import torch
from run import begin, cpu_seconds, read_work_dir, say, show_page, train

TITLE = 'Diffusion: DiS, digits made of noise'
CONFIG = 'configs/demo/dis_digits-8.py'
#: Percent of the samples that are of the class that was asked for, with room below what is reached.
FLOOR = 70.0
#: Digits of each class, calls of the model for each, and the scale of guidance.
COUNT, STEPS, GUIDANCE = 30, 50, 1.5
#: Of the noise, as in the config.
BETA_END = 0.01
#: Rows of the page's pictures.
ROWS = 8


def train_classifier(images, labels):
    """A small network on pixels, as scikit-learn has it."""
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((256,), max_iter=300, tol=1e-3, random_state=0).fit(
        flat(images), labels)


def flat(images):
    """(N, H, W) in uint8 to (N, H W) from 0 to 1."""
    return images.reshape(len(images), -1) / 255


def make(checkpoint, folder):
    """New digits (N, H, W) in uint8 and the classes that were asked for (N), by a pipeline that is
    saved into the folder and read again."""
    from vmamba_mm.diffusers import DiS2DModel, DiSPipeline, published_scheduler

    model = DiS2DModel.from_checkpoint(checkpoint)
    DiSPipeline(model, published_scheduler(
        clip_sample=True, beta_end=BETA_END)).save_pretrained(folder)
    pipe = DiSPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(desc='[demo] samples', mininterval=5)
    labels = np.tile(np.arange(model.num_classes), COUNT)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    images = pipe.to(device)(
        class_labels=labels.tolist(), guidance_scale=GUIDANCE, guided_channels=None,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0),
        output_type='np').images
    return np.round(images[..., 0] * 255).astype(np.uint8), labels


def distances(first, second):
    """(N, M), of pixels from 0 to 1, root mean square."""
    first, second = flat(first), flat(second)
    square = (first ** 2).sum(1)[:, None] + (second ** 2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(square, 0) / first.shape[1])


def apart(images, labels):
    """The mean distance of two images of one class."""
    found = []
    for label in np.unique(labels):
        own = distances(images[labels == label], images[labels == label])
        found.append(own[np.triu_indices(len(own), 1)].mean())
    return float(np.mean(found))


def grid(images, labels):
    """A picture with ROWS rows and a column for each class, and white lines between them."""
    height, width = (side + 1 for side in images.shape[1:])
    page = np.full((ROWS, height, len(scenes.CLASSES), width, 3), 255, np.uint8)
    for label in range(len(scenes.CLASSES)):
        column = images[labels == label][:ROWS]
        page[:len(column), :-1, label, :-1] = column[..., None]
    return page.reshape(ROWS * height, -1, 3)


def draw(made, asked, real, labels, folder):
    """Two pictures: new digits beside real ones they have not been made from, and the digit of the
    training set that each new one is nearest to."""
    folder.mkdir(parents=True)
    held, held_labels = real['val'], labels['val']
    nearest = real['train'][distances(made, real['train']).argmin(1)]
    for name, pairs in {
            '1': ((made, asked, 'made of noise'), (held, held_labels, 'held-out digits')),
            '2': ((made, asked, 'made of noise, the same'),
                  (nearest, asked, 'nearest digit of the training set'))}.items():
        panels = [report.panel(grid(images, of), np.zeros(1), {}, title)
                  for images, of, title in pairs]
        report.side_by_side(panels).save(folder / f'{name}.png')


def main():
    work_dir = read_work_dir(__doc__, 'work_dirs/demo-diffusion')
    start, root = time.time(), Path('data/demo/digits')
    begin(TITLE, 'digits', work_dir)
    seconds, checkpoint = train(CONFIG, work_dir)

    real, labels = {}, {}
    for split in ('train', 'val'):
        real[split], labels[split] = small_digits.read(root, split)
    classifier = train_classifier(real['train'], labels['train'])
    right = 100 * classifier.score(flat(real['val']), labels['val'])
    made, asked = make(checkpoint, work_dir / 'pipeline')
    sure, sure_of_real = (classifier.predict_proba(flat(x)).max(1) for x in (made, real['val']))
    share = 100 * np.mean(classifier.predict(flat(made)) == asked)
    draw(made, asked, real, labels, work_dir / 'predictions')
    lines = [
        f'{share:.1f} % of {len(made)} new digits are of the class that was asked for, to a '
        f'classifier of real digits (floor {FLOOR:g} %, chance 10 %)',
        f'that classifier is right on {right:.1f} % of held-out digits; its mean confidence is '
        f'{100 * sure.mean():.0f} % on new digits and {100 * sure_of_real.mean():.0f} % on these',
        'It says that classes are obeyed, and nothing of how real or how varied the digits are:',
        f'two new digits of a class are {apart(made, asked):.3f} apart, two held-out ones '
        f'{apart(real["val"], labels["val"]):.3f}; from the nearest digit of the',
        f'training set new ones are {distances(made, real["train"]).min(1).mean():.3f} away, '
        f'held-out ones {distances(real["val"], real["train"]).min(1).mean():.3f} (0 would be a '
        'copy; root mean square of pixels)',
        f'Below, from the left: {", ".join(sorted(scenes.CLASSES))}.']
    show_page(TITLE, lines, work_dir, columns=1)
    say(f'a pipeline of diffusers, for DiSPipeline.from_pretrained: {work_dir / "pipeline"}')
    say(f'took {time.time() - start:.0f} s (training: {seconds:.0f} s; CPU time '
        f'{cpu_seconds():.0f} s)')
    if not share >= FLOOR:
        raise SystemExit(f'[demo] FAILED: below the floor of {FLOOR:g} %')


if __name__ == '__main__':
    main()
