# ImageNet-1k with classes, as latents of Stable Diffusion's autoencoder: an eighth of the image in
# each direction. The leaf names the backbone.
_base_ = ['../../_base_/tasks/diffusion.py']

size = 256
model = dict(
    # diffusers' AutoencoderKL: a name of the hub, or a folder.
    vae='stabilityai/sd-vae-ft-ema',
    backbone=dict(type='vmamba_mm.DiS', drop_path_rate=0.1))

dataset = dict(type='mmpretrain.ImageNet', data_root='data/imagenet')
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='vmamba_mm.HalvingCenterCrop', size=size),
    dict(type='mmpretrain.PackInputs'),
]
flip = dict(type='RandomFlip', prob=0.5, direction='horizontal')
train_dataloader = dict(
    batch_size=16, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(split='train', pipeline=[*pipeline[:-1], flip, pipeline[-1]], **dataset))
# 50,000 images, 50 of each class. Published FIDs compare with ADM's file of training images.
val_dataloader = dict(
    batch_size=32, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='val', pipeline=pipeline, **dataset))
test_dataloader = val_dataloader
