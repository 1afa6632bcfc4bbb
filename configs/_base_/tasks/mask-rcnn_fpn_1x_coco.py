# Mask R-CNN + FPN on COCO, 8 GPUs x 2 images, 12 epochs, 800x1333: Swin-T's stock
# recipe (AdamW 1e-4, weight decay 0.05, fp32, no clipping), as the published models used it.
# The leaf replaces the backbone with _delete_=True: the release merged onto Swin's dict, and
# its left-over keys (window_size, init_cfg ...) were swallowed without a word.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '../schedules/dense_decay.py',
    '../vmamba_mm.py',
]

optim_wrapper = dict(
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(fused=True),
    paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dense_decay_keys))

# Published numbers are those of the best epoch (11 or 12 of 12; 31 to 36 of 36).
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='coco/bbox_mAP', rule='greater'))

pretrained = None  # was the address of Swin's weights; nothing reads it
