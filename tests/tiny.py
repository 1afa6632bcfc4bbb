"""Tiny data sets and configs for the tests of the tools, in the layouts of the three tasks."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
SIZE = 32

BACKBONE = """dict(
    _delete_=True, type='vmamba_mm.VMamba', drop_path_rate=0.2, out_indices={out},
    arch=dict(embed_dims=8, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
              conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
              scan='cross'))"""


def write_image(path, colour, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.clip(rng.normal(colour, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(image).save(path)


def make_cls(root, per_class=6):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name, colour in (('blue', (40, 60, 220)), ('red', (220, 60, 40))):
            for i in range(per_class):
                write_image(root / split / name / f'{i}.png', colour, rng)


def make_seg(root, count=7):
    rng = np.random.default_rng(1)
    for split in ('training', 'validation'):
        for i in range(count):
            write_image(root / 'images' / split / f'{i}.jpg', (90, 120, 60), rng)
            labels = np.ones((SIZE, SIZE), np.uint8)
            labels[:, SIZE // 2:] = 2
            path = root / 'annotations' / split / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(path)


def make_det(root, count=4):
    rng = np.random.default_rng(2)
    images, annotations = [], []
    for i in range(count):
        write_image(root / 'images' / f'{i}.jpg', (90, 120, 60), rng)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=SIZE, height=SIZE))
        x, y, w, h = box = [4 + i, 5, 16, 14]
        annotations.append(dict(id=i, image_id=i, category_id=1, bbox=box, area=w * h, iscrowd=0,
                                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
    (root / 'train.json').write_text(json.dumps(dict(
        images=images, annotations=annotations, categories=[dict(id=1, name='box')])))


RUNTIME = """
default_hooks = dict(logger=dict(type='LoggerHook', interval=1),
                     checkpoint=dict(type='CheckpointHook', interval={interval},
                                     by_epoch={by_epoch}, max_keep_ckpts=2))
log_level = 'INFO'
load_from = None
resume = False
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
               dist_cfg=dict(backend='nccl'))
"""


def cls_config(root, workers=1, epochs=4, batch=4, augment='batch', amp=True, seed=None):
    """Epoch-based, with EMA, a warm-up by iterations and no fixed seed.

    ``augment``: 'batch' adds to the augmentation of samples that of batches, and drop path; both
    draw other numbers in every process.
    """
    train_cfg = dict(augments=[dict(type='Mixup', alpha=0.8)]) if augment == 'batch' else None
    random = """dict(type='RandomResizedCrop', scale=32), dict(type='RandomFlip', prob=0.5),
    dict(type='RandomErasing', erase_prob=0.5, mode='rand'),""" if augment else ''
    backbone = BACKBONE.format(out='(3,)').replace('_delete_=True, ', '')
    if augment != 'batch':
        backbone = backbone.replace('drop_path_rate=0.2', 'drop_path_rate=0.')
    return f"""
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier', backbone={backbone},
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64, topk=(1,),
              loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg={train_cfg})
data_preprocessor = dict(num_classes=2, mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True)
train_pipeline = [dict(type='LoadImageFromFile'), {random} dict(type='PackInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)),
                 dict(type='PackInputs')]
train_dataloader = dict(
    batch_size={batch}, num_workers={workers}, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root={str(root)!r}, data_prefix='train',
                 pipeline=train_pipeline))
val_dataloader = dict(
    batch_size={batch}, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root={str(root)!r}, data_prefix='val',
                 pipeline=test_pipeline))
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader, test_evaluator = val_dataloader, val_evaluator
optim_wrapper = dict(type={'AmpOptimWrapper' if amp else 'OptimWrapper'!r},
                     optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=2,
                        convert_to_iter_based=True),
                   dict(type='CosineAnnealingLR', by_epoch=True, begin=2)]
train_cfg = dict(by_epoch=True, max_epochs={epochs}, val_interval=1)
val_cfg, test_cfg = dict(), dict()
custom_hooks = [dict(type='EMAHook', momentum=1e-2)]
randomness = dict(seed={seed})
auto_scale_lr = dict(base_batch_size=4)
{RUNTIME.format(interval=1, by_epoch=True)}
"""


#: where the types of cls_config are imported from in mmengine's pure Python style
MODULES = {
    'mmengine.dataset': 'DefaultSampler', 'mmengine.hooks': 'LoggerHook, CheckpointHook, EMAHook',
    'mmengine.optim': 'OptimWrapper, AmpOptimWrapper, LinearLR, CosineAnnealingLR',
    'mmengine.visualization': 'LocalVisBackend', 'torch.optim': 'AdamW',
    'mmcv.transforms': 'LoadImageFromFile, RandomFlip, Resize',
    'mmpretrain.datasets': 'CustomDataset, PackInputs, RandomErasing, RandomResizedCrop',
    'mmpretrain.models': 'ImageClassifier, GlobalAveragePooling, LinearClsHead, LabelSmoothLoss, '
                         'Mixup',
    'mmpretrain.evaluation': 'Accuracy', 'mmpretrain.engine': 'VisualizationHook',
    'mmpretrain.visualization': 'UniversalVisualizer', 'vmamba_mm.models': 'VMamba'}


def new_style(text):
    """cls_config in mmengine's pure Python style: classes as types, and no default_scope."""
    text = re.sub(r"type='(?:\w+\.)*(\w+)'", r'type=\1', text)
    text = text.replace("default_scope = 'mmpretrain'\n", '')
    imports = [f'from {module} import {names}' for module, names in MODULES.items()]
    return '\n'.join([*imports, text, 'default_hooks.update(visualization=dict('
                      'type=VisualizationHook))', 'visualizer = dict(type=UniversalVisualizer, '
                      'vis_backends=[dict(type=LocalVisBackend)])', ''])


def seg_config(root, workers=1, iters=10):
    """Iteration-based, with SyncBN, an endless sampler and multi-scale flip TTA."""
    backbone = BACKBONE.format(out='(3,)').replace('_delete_=True, ', '')
    return f"""
default_scope = 'mmseg'
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), mean=[120, 120, 120],
                           std=[60, 60, 60], bgr_to_rgb=True, pad_val=0, seg_pad_val=255),
    backbone={backbone},
    decode_head=dict(type='FCNHead', in_channels=64, in_index=0, channels=8, num_convs=1,
                     num_classes=150, norm_cfg=norm_cfg, dropout_ratio=0.1,
                     loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(64, 32), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(32, 32)), dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadImageFromFile'),
                 dict(type='Resize', scale=(64, 32), keep_ratio=True),
                 dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (0.5, 1.0)],
        [dict(type='RandomFlip', prob=0., direction='horizontal'),
         dict(type='RandomFlip', prob=1., direction='horizontal')],
        [dict(type='LoadAnnotations', reduce_zero_label=True)], [dict(type='PackSegInputs')]])]
def_dataset = dict(type='ADE20KDataset', data_root={str(root)!r})
train_dataloader = dict(
    batch_size=2, num_workers={workers}, persistent_workers={workers > 0},
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ADE20KDataset', data_root={str(root)!r}, pipeline=train_pipeline,
                 data_prefix=dict(img_path='images/training',
                                  seg_map_path='annotations/training')))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ADE20KDataset', data_root={str(root)!r}, pipeline=test_pipeline,
                 data_prefix=dict(img_path='images/validation',
                                  seg_map_path='annotations/validation')))
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_dataloader, test_evaluator = val_dataloader, val_evaluator
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=3),
                   dict(type='PolyLR', power=1.0, by_epoch=False, begin=3, end={iters})]
train_cfg = dict(type='IterBasedTrainLoop', max_iters={iters}, val_interval=4)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
log_processor = dict(by_epoch=False)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer')
{RUNTIME.format(interval=3, by_epoch=False)
 .replace('max_keep_ckpts=2)', 'max_keep_ckpts=2),' + chr(10) +
          '    visualization=dict(type="SegVisualizationHook")')
 .replace('interval=1)', 'interval=1, log_metric_by_epoch=False)')}
"""


def det_config(root):
    """Stock Mask R-CNN with the backbone replaced, as a user would write it."""
    return f"""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py',
          'mmdet::_base_/datasets/coco_instance.py',
          'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']
model = dict(
    backbone={BACKBONE.format(out='(0, 1, 2, 3)')},
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=1),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=1)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)))
metainfo = dict(classes=('box',), palette=[(220, 20, 60)])
test_pipeline = [dict(type='LoadImageFromFile'),
                 dict(type='Resize', scale=(64, 64), keep_ratio=True),
                 dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape',
                                                       'img_shape', 'scale_factor'))]
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root={str(root)!r}, ann_file='train.json', data_prefix=dict(img='images'),
    metainfo=metainfo))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    data_root={str(root)!r}, ann_file='train.json', data_prefix=dict(img='images'),
    metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={str(root / 'train.json')!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""
