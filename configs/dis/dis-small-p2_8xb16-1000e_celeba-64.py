# Pixels, without classes; the images lie in one folder.
_base_ = ['../_base_/tasks/diffusion.py']

model = dict(
    backbone=dict(type='vmamba_mm.DiS', drop_path_rate=0.1,
                  arch=dict(base='small_p2', image_size=64, in_channels=3, num_classes=0)))

dataset = dict(type='mmpretrain.CustomDataset', data_root='data/celeba',
               data_prefix='img_align_celeba', with_label=False)
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='vmamba_mm.HalvingCenterCrop', size=64),
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=[*pipeline[:-1], dict(type='RandomFlip', prob=0.5,
                                                direction='horizontal'), pipeline[-1]], **dataset))
val_dataloader = dict(
    batch_size=64, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=pipeline, indices=50_000, **dataset))
test_dataloader = val_dataloader
