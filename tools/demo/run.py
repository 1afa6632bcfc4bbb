"""One demo from end to end: build the set, train, evaluate, predict, report, check the floor.

    python tools/demo/run.py cls        (make demo)
    python tools/demo/run.py det        (make demo-det)
    python tools/demo/run.py seg        (make demo-seg)
    python tools/demo/run.py video      (make demo-video)

It calls the project's own tools/train.py, test.py and predict.py, and stops with an error when the
held-out accuracy is below the floor.
"""
import argparse
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import make_data
import report
import screen
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Demo:
    """One demo.

    Args:
        title: of its page.
        config, part: the config, and the part of the demo set that it reads.
        images, every: a pattern of the images to predict, of which each so manyth is taken.
        floors: the metrics that CI checks, and the least that they must reach. They leave room
            below what the demo reaches: see configs/demo and docs/demos.md.
        chance: what a model without training would reach, in words.
        from_classifier: whether it starts from the classifier of the demo 'cls'.
        needs_operators: whether it needs mmcv's compiled operators.
        enlarge: whether names and outlines would hide the digits on images of this size.
        baseline: a config that is trained and evaluated too, for a comparison, and what it is, in
            words.
        margin: the least by which the demo must be above it.
    """

    title: str
    config: str
    part: str
    images: str
    every: int
    floors: dict
    chance: str
    from_classifier: bool = True
    needs_operators: bool = False
    enlarge: bool = False
    baseline: tuple[str, str] | None = None
    margin: float = 0.0


DEMOS = {
    'cls': Demo(
        title='Classification: VMamba, ten digits on photographs',
        config='configs/demo/vmamba_digits-48.py', part='imagenet',
        images='data/demo/imagenet/val/*/*.png', every=85, floors={'accuracy/top1': 90.0},
        chance='10 %', from_classifier=False),
    'det': Demo(
        title='Detection: Mask R-CNN with VMamba, digits on photographs',
        config='configs/demo/mask-rcnn_vmamba_digits-128.py', part='coco',
        images='data/demo/coco/val2017/*.png', every=9,
        floors={'coco/bbox_mAP': 0.4, 'coco/segm_mAP': 0.3}, chance='about 0',
        needs_operators=True, enlarge=True),
    'seg': Demo(
        title='Segmentation: UperNet with VMamba, digits on photographs',
        config='configs/demo/upernet_vmamba_digits-128.py', part='ade20k',
        images='data/demo/ade20k/images/validation/*.png', every=9, floors={'mIoU': 45.0},
        chance='8.4, all photograph'),
    'video': Demo(
        title='Video classification: VideoMamba, digits that move over photographs',
        config='configs/demo/videomamba_moving-digits-32.py', part='clips',
        images='data/demo/clips/val/*/*.mp4', every=41, floors={'accuracy/top1': 75.0},
        chance='12.5 %', from_classifier=False, margin=50.0,
        baseline=('configs/demo/videomamba_single-frame-32.py',
                  'on a single frame, which tells one digit of two: 25 % at most')),
}


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def say(text):
    print(f'[demo] {text}', flush=True)


def set_threads():
    """One core is left to the data loader.

    On two cores beside other busy processes, two OpenMP threads were 2 to 10 times slower than one,
    which alone takes 1.5 times as long as two.
    """
    os.environ.setdefault('OMP_NUM_THREADS', str(min(max((os.cpu_count() or 2) - 1, 1), 4)))


def run(name, log, *command):
    """Run one of the tools; what matters of its output is shown. Returns the seconds it took."""
    command = [sys.executable, *map(str, command)]
    say(f'{name}: python {shlex.join(c for c in command[1:5])} (all it says: {log})')
    start = time.time()
    code = screen.run(command, ROOT, log)
    if code:
        raise SystemExit(f'[demo] FAILED: {name} ended with exit code {code}; see {log}')
    return time.time() - start


def read_work_dir(doc, default):
    """The option of a demo that is a script of its own."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path(default),
                        help='made anew (default: %(default)s)')
    return parser.parse_args().work_dir


def begin(title, part, work_dir):
    """Say what comes, build the part of the demo set, and empty the work dir."""
    os.chdir(ROOT)
    set_threads()
    say(f'{title}; on 2 CPU cores some minutes, on a GPU less')
    make_data.build('data/demo', make_data.DEFAULTS, [part])
    shutil.rmtree(work_dir, ignore_errors=True)


def train(config, work_dir, name='train'):
    """The seconds that it took, and the last checkpoint."""
    seconds = run(name, work_dir / 'train.log', 'tools/train.py', config, '--work-dir', work_dir)
    return seconds, Path((work_dir / 'last_checkpoint').read_text().strip())


def show_page(title, lines, work_dir, columns=None):
    """Say the results, and write them with the curves and the pictures of the work dir."""
    for line in lines:
        say(line)
    sheet = report.contact_sheet(work_dir / 'report.png', title, lines, work_dir / 'curves.png',
                                 work_dir / 'predictions', columns)
    say(f'everything on one page: {sheet}')


def hide_gpu_from_cpu_operators():
    """Run all on the CPU where mmcv was built without CUDA: its RoIAlign and NMS run there only."""
    probe = ('import sys, torch\n'
             'if not torch.cuda.is_available(): sys.exit()\n'
             'from mmcv.ops import nms\n'
             "nms(torch.rand(2, 4, device='cuda'), torch.rand(2, device='cuda'), 0.5)")
    if subprocess.run([sys.executable, '-c', probe], capture_output=True).returncode:
        say('mmcv has no CUDA operators here (tools/setup_env.sh): detection runs on the CPU')
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def keep_classifier(checkpoint, work_dir):
    """Put the weights where the other two demos look for them, with what they were trained from."""
    shutil.copyfile(checkpoint, work_dir / 'classifier.pth')
    (work_dir / 'classifier.txt').write_text(classifier_id())


def classifier_id():
    """Changes with the config and with the set: then the classifier is trained again."""
    digest = hashlib.sha256(make_data.settings_id(make_data.DEFAULTS).encode())
    for name in ('vmamba_digits-48.py', 'small_vmamba.py'):
        digest.update((ROOT / 'configs/demo' / name).read_bytes())
    return digest.hexdigest()[:16]


def ensure_classifier():
    """The published recipe starts detection and segmentation from a classifier; so do the demos."""
    start, work_dir = time.time(), Path('work_dirs/demo-cls')
    note = work_dir / 'classifier.txt'
    if (work_dir / 'classifier.pth').is_file() and note.is_file() \
            and note.read_text() == classifier_id():
        say(f'starting from the classifier in {work_dir}')
        return 0.0
    say('no classifier to start from yet: training it first, as make demo does')
    make_data.build('data/demo', make_data.DEFAULTS, ['imagenet'])
    shutil.rmtree(work_dir, ignore_errors=True)
    _, checkpoint = train(DEMOS['cls'].config, work_dir, 'train the classifier')
    keep_classifier(checkpoint, work_dir)
    return time.time() - start


def enlarged(paths, folder, factor=4):
    """Larger copies: names and outlines drawn on 128 pixels would hide the digits."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for path in paths:
        with Image.open(path) as image:
            size = (image.width * factor, image.height * factor)
            image.resize(size, Image.BICUBIC).save(folder / path.name)
        copies.append(folder / path.name)
    return copies


def evaluate(config, checkpoint, work_dir):
    """The seconds that it took, and the metrics."""
    metrics = work_dir / 'metrics.json'
    seconds = run('evaluate', work_dir / 'evaluate.log', 'tools/test.py', config, checkpoint,
                  '--work-dir', work_dir / 'test', '--out', metrics)
    return seconds, json.loads(metrics.read_text())


def train_baseline(config, work_dir):
    """The same for what the demo is compared with, its training included."""
    seconds, checkpoint = train(config, work_dir, 'train what it is compared with')
    spent, metrics = evaluate(config, checkpoint, work_dir)
    return seconds + spent, metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=DEMOS)
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo-TASK, made anew')
    args = parser.parse_args()
    demo, name = DEMOS[args.task], args.task
    work_dir = args.work_dir or Path('work_dirs') / f'demo-{name}'
    start = time.time()
    begin(demo.title, demo.part, work_dir)
    seconds = dict(data=time.time() - start)
    if demo.needs_operators:
        hide_gpu_from_cpu_operators()
    if demo.from_classifier:
        seconds['classifier'] = ensure_classifier()
    seconds['train'], checkpoint = train(demo.config, work_dir)
    if name == 'cls':
        keep_classifier(checkpoint, work_dir)
    seconds['evaluate'], metrics = evaluate(demo.config, checkpoint, work_dir)
    if demo.baseline:
        seconds['baseline'], base_metrics = train_baseline(demo.baseline[0], work_dir / 'baseline')
    images = sorted(Path().glob(demo.images))[::demo.every][:12]
    if demo.enlarge:
        images = enlarged(images, work_dir / 'images')
    shutil.rmtree(work_dir / 'predictions', ignore_errors=True)
    seconds['predict'] = run('predict', work_dir / 'predict.log', 'tools/predict.py',
                             demo.config, checkpoint, *images, '--out-dir',
                             work_dir / 'predictions')

    results = {key: metrics[key] for key in demo.floors}
    lines = [f'{key} = {value:.4g} on held-out digits and photographs (floor '
             f'{demo.floors[key]:g}, chance {demo.chance})'
             for key, value in results.items()]
    low = [key for key, floor in demo.floors.items() if not results[key] >= floor]
    if demo.baseline:
        key = next(iter(demo.floors))
        gain = results[key] - base_metrics[key]
        lines.append(f'{gain:.4g} points above {base_metrics[key]:.4g}, of the same model trained '
                     f'in the same way {demo.baseline[1]} (floor {demo.margin:g} points)')
        low += ['the gain'] if not gain >= demo.margin else []
    show_page(demo.title, lines, work_dir)
    say(f'curves: {work_dir / "curves.png"}; pictures: {work_dir / "predictions"}; '
        f'checkpoint: {checkpoint.name}')
    spent = ', '.join(f'{key} {value:.0f} s' for key, value in seconds.items())
    say(f'took {time.time() - start:.0f} s ({spent}; CPU time {cpu_seconds():.0f} s)')
    if low:
        raise SystemExit(f'[demo] FAILED: below the floor: {", ".join(low)}')


if __name__ == '__main__':
    main()
