import json

from PIL import Image

from vmamba_mm.mm.hooks.curves import group_metrics, plot_curves, read_scalars


def write(work_dir, start, lines):
    path = work_dir / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(x) for x in lines) + '\n{"loss": 1')


def train(step, loss):
    return dict(loss=loss, loss_rpn=loss / 2, lr=0.1, iter=step, step=step)


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    write(tmp_path, '20260101_000000', [train(1, 9.), train(2, 8.), dict(mIoU=1., step=1),
                                        train(3, 7.), train(4, 6.)])
    write(tmp_path, '20260102_000000', [train(3, 3.), train(4, 2.), dict(mIoU=2., step=2)])
    steps, metrics = read_scalars(tmp_path)
    assert [(r['step'], r['loss']) for r in steps] == [(1, 9.), (2, 8.), (3, 3.), (4, 2.)]
    assert [(r['step'], r['mIoU']) for r in metrics] == [(1, 1.), (2, 2.)]


def test_plot(tmp_path):
    assert plot_curves(tmp_path) is None
    write(tmp_path, '20260101_000000', [
        train(1, 9.), train(2, 8.), {'coco/bbox_mAP': .1, 'coco/segm_mAP': .2, 'step': 1,
                                     'coco/bbox_mAP_l': -1., 'x': float('nan')}])
    path = plot_curves(tmp_path)
    assert path == tmp_path / 'curves.png'
    assert Image.open(path).size > (600, 400)


def test_panels():
    panels = group_metrics({'coco/bbox_mAP': ([1], [.1]), 'coco/bbox_mAP_l': ([1], [-1]),
                            'coco/segm_mAP': ([1], [.2]), 'accuracy/top1': ([1], [90.]),
                            'accuracy/top5': ([1], [99.])})
    assert [(title, list(members)) for title, members in panels] == [
        ('coco bbox', ['coco/bbox_mAP']), ('coco segm', ['coco/segm_mAP']),
        ('accuracy', ['accuracy/top1', 'accuracy/top5'])]
