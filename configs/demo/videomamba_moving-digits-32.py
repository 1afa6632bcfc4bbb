# `make demo-video`: digits that move over photographs, in mp4 files in a folder for each class,
# which is digit and direction. The task is that of Something-Something v2, whose classes have a
# left and a right too, so that nothing is flipped; what differs is the size of things.
_base_ = ['../_base_/tasks/video_ssv2.py']

num_frames, size, classes = 6, 32, 8
model = dict(
    backbone=dict(
        type='vmamba_mm.VideoMamba', out_type='cls_token',
        arch=dict(embed_dims=64, depth=2, d_state=4, patch_size=8, image_size=size,
                  num_frames=num_frames, tubelet_size=1),
        # The published initialisation is for 192 channels and more, and for weights of ImageNet to
        # start from. With 64 its gates are nearly closed, and its steps dt of 0.7 forget a frame
        # within a row of patches: nothing was learned for hundreds of iterations. Linear layers
        # with a bias are those of dt alone: they start at 0.05.
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform', bias=-3.0)),
    head=dict(in_channels=64, num_classes=classes),
    train_cfg=None)  # no mixing: the few epochs of a demo are short
data_preprocessor = dict(num_classes=classes)

train_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=num_frames, random=True),
    dict(type='vmamba_mm.PerFrame', transforms=[
        # The whole digit stays in view.
        dict(type='vmamba_mm.RandomResizedCrop', scale=size, crop_ratio_range=(0.75, 1.0),
             aspect_ratio_range=(0.9, 1.1))]),
    dict(type='vmamba_mm.PackClips'),
]
test_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=num_frames),
    dict(type='vmamba_mm.PerFrame', transforms=[
        dict(type='ResizeEdge', scale=36, edge='short'),
        dict(type='CenterCrop', crop_size=size)]),
    dict(type='vmamba_mm.PackClips'),
]

root = dict(data_root='data/demo/clips', ann_file='')
train_dataloader = dict(
    batch_size=32, num_workers=1,
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **root))
val_dataloader = dict(
    batch_size=40, num_workers=1,
    dataset=dict(data_prefix='val', pipeline=test_pipeline, **root))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

max_epochs = 10
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
# fp32 on every machine, so that CPU and GPU give the same numbers
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=1, end=max_epochs,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_best=None))
