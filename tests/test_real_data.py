"""A few dozen steps on real photographs, through the leaf configs of each task.

The models are small and start from random weights; what is tested is that config, data, loss,
optimizer, schedule and metric work together, not how good the model is.
"""
import copy

import pytest
from official import shared

ARCH = dict(embed_dims=32, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
            scan='cross')
CHANNELS = [32, 64, 128, 256]

pytestmark = pytest.mark.slow


def data_root(name):
    return f'{shared(f"data/{name}")}/'


def replace_sync_bn(node):
    if isinstance(node, dict):
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
        node = node.values()
    elif not isinstance(node, list | tuple):
        return
    for value in node:
        replace_sync_bn(value)


def train(cfg, work_dir):
    """Run the config here; returns the losses of all steps and the last metrics."""
    import torch
    from mmengine.runner import Runner
    if not torch.cuda.is_available():
        replace_sync_bn(cfg.model)
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.val_cfg.pop('fp16', None)
        cfg.test_cfg.pop('fp16', None)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
    cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)
    cfg.default_hooks.checkpoint.update(interval=-1, save_best=None)
    cfg.default_hooks.logger.interval = 10
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    cfg.randomness = dict(seed=0)
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = runner.message_hub.log_scalars
    metrics = {key[len('val/'):]: values.current()
               for key, values in history.items() if key.startswith('val/')}
    return history['train/loss'].data[0], metrics


def shrink(pipeline, sizes):
    """Smaller images than the config's, for a CPU."""
    for transform in pipeline:
        for key in ('scale', 'crop_size'):
            if transform.get(key) in sizes:
                transform[key] = sizes[transform[key]]


def assert_falls(losses, factor):
    n = max(len(losses) // 6, 5)
    first, last = losses[:n].mean(), losses[-n:].mean()
    assert last < factor * first, f'the loss went from {first:.3f} to {last:.3f} only'


def test_flowers(read_config, tmp_path):
    """ImageNet config: 5 kinds of flowers, 800 training and 300 other images."""
    root = data_root('flowers')
    cfg = read_config('configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py')
    cfg.model.backbone.update(arch=ARCH, drop_path_rate=0.)
    cfg.model.head.update(in_channels=CHANNELS[-1], num_classes=5)
    cfg.data_preprocessor.num_classes = 5
    for split, loader in (('train', cfg.train_dataloader), ('val', cfg.val_dataloader)):
        loader.batch_size = 32
        dataset = loader.dataset
        dataset.pop('split')
        dataset.update(type='CustomDataset', data_root=root, data_prefix=split)
        shrink(dataset.pipeline, {224: 96, 256: 110})
    # 100 steps instead of 300 epochs; the average of the weights has to keep up.
    epochs = 4
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    warmup, cosine = cfg.param_scheduler
    warmup.end = cosine.begin = 1
    cosine.end = epochs
    cfg.custom_hooks[0].momentum = 0.05
    cfg.val_evaluator.topk = (1, )

    losses, metrics = train(cfg, tmp_path)
    assert len(losses) == epochs * 25
    assert_falls(losses, 0.97)
    assert metrics['accuracy/top1'] > 33  # chance is 20


def test_fruits_nuts(read_config, tmp_path):
    """COCO config: dates, figs and hazelnuts; 14 images, learnt by heart."""
    root = data_root('fruits_nuts')
    cfg = read_config('configs/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py')
    cfg.model.backbone.update(arch=ARCH, drop_path_rate=0., init_cfg=None)
    # The stock neck and heads take most of the time: a quarter of their width, fewer samples.
    cfg.model.neck.update(in_channels=CHANNELS, out_channels=64)
    cfg.model.rpn_head.update(in_channels=64, feat_channels=64)
    roi_head = cfg.model.roi_head
    roi_head.bbox_roi_extractor.out_channels = roi_head.mask_roi_extractor.out_channels = 64
    roi_head.bbox_head.update(num_classes=3, in_channels=64, fc_out_channels=256)
    roi_head.mask_head.update(num_classes=3, in_channels=64, num_convs=2, conv_out_channels=64)
    cfg.model.train_cfg.rcnn.sampler.num = 128
    repeats, epochs = 2, 10
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(
            data_root=root, ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=('date', 'fig', 'hazelnut')))
        shrink(loader.dataset.pipeline, {(1333, 800): (400, 300)})
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=repeats, dataset=cfg.train_dataloader.dataset)
    cfg.val_evaluator.ann_file = f'{root}annotations/instances_train.json'
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    warmup, steps = cfg.param_scheduler
    warmup.end = 10
    steps.update(end=epochs, milestones=[epochs - 1])
    cfg.optim_wrapper.optimizer.lr = 5e-4

    losses, metrics = train(cfg, tmp_path)
    assert len(losses) == epochs * repeats * 7
    # The box and mask terms grow at first, with the proposals that hit something.
    assert_falls(losses, 0.85)
    assert metrics['coco/bbox_mAP_50'] > 0.04  # boxes at random hit nothing
    assert metrics['coco/segm_mAP_50'] > 0.02


def test_camvid(read_config, tmp_path):
    """ADE20K config: street scenes with 11 classes."""
    root = data_root('camvid')
    cfg = read_config('configs/vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512.py')
    cfg.model.backbone.update(arch=ARCH, drop_path_rate=0., init_cfg=None)
    cfg.model.decode_head.update(in_channels=CHANNELS, channels=64, num_classes=11)
    cfg.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=64, num_classes=11)
    cfg.model.data_preprocessor.size = (224, 224)
    classes = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car',
               'pedestrian', 'bicyclist')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(type='BaseSegDataset', data_root=root, reduce_zero_label=True,
                              img_suffix='.jpg', seg_map_suffix='.png',
                              metainfo=dict(classes=classes))
        shrink(loader.dataset.pipeline, {(2048, 512): (320, 240), (512, 512): (224, 224)})
    iters = 60
    cfg.train_dataloader.batch_size = 4
    cfg.train_cfg.update(max_iters=iters, val_interval=iters)
    warmup, poly = cfg.param_scheduler
    warmup.end = poly.begin = 5
    poly.end = iters
    cfg.optim_wrapper.optimizer.lr = 1e-3

    losses, metrics = train(cfg, tmp_path)
    assert len(losses) == iters
    assert_falls(losses, 0.7)
    assert metrics['mIoU'] > 11  # one class everywhere gives less than 4
