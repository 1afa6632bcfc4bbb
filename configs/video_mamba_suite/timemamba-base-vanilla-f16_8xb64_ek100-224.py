# Actions of EPIC-KITCHENS-100, pairs of a verb and a noun, with a rate for SGD of the whole model.
# The official loader cuts segments out of long videos; here a segment is a file.
_base_ = ['../_base_/tasks/video_k400.py']

model = dict(
    backbone=dict(
        type='vmamba_mm.TimeMamba',
        arch='base_vanilla',
        out_type='cls_token',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://timemamba/base_vanilla.ego4d',
            prefix='backbone.')),
    drop_rate=0.5,
    head=dict(
        num_classes=3806, in_channels=768,
        init_cfg=dict(type='Normal', layer='Linear', std=0.01, bias=0.)))

# As CLIP normalises images.
data_preprocessor = dict(
    num_classes=3806,
    mean=[122.7709383, 116.7460125, 104.09373615], std=[68.5005327, 66.6321579, 70.32316305])

train_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=16, random=True),
    dict(type='vmamba_mm.PerFrame', transforms=[
        dict(type='vmamba_mm.RandomResizedCrop', scale=224, crop_ratio_range=(0.5, 1.0))]),
    dict(type='vmamba_mm.PackClips'),
]
val_pipeline = _base_.val_pipeline
val_pipeline[0].num_frames = 16
test_pipeline = val_pipeline

root = dict(data_root='data/ek100')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **root))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline, **root))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, **root))

optim_wrapper = dict(
    # Published as 3e-3 for 128 samples.
    optimizer=dict(_delete_=True, type='SGD', lr=1.2e-2, momentum=0.9, weight_decay=5e-4),
    # 1-D parameters, biases and the position embedding do not decay; the class token does.
    paramwise_cfg=dict(custom_keys={'cls_token': dict(decay_mult=1.)}))
# From 1e-6 and to 1e-5, before the factor for the batch.
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3000, by_epoch=True, begin=0, end=2,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1 / 300, by_epoch=True, begin=2, end=100,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
