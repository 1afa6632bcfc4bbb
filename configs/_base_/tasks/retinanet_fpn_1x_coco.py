# RetinaNet + FPN on COCO, 8 GPUs x 2 images, 12 epochs, 800x1333: the stock model and data, on the
# stages 1 to 3 of a backbone, with AdamW. The leaf names the backbone and the neck's in_channels.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    '../schedules/dense_decay.py',
    '../vmamba_mm.py',
]

# The stock neck starts from the second of four maps: the first is not asked for.
model = dict(neck=dict(start_level=0))

optim_wrapper = dict(
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(
        _delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, fused=True),
    paramwise_cfg=dict(custom_keys=_base_.dense_decay_keys))

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='coco/bbox_mAP', rule='greater'))
