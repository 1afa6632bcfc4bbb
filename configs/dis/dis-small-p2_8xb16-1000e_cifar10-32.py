# Pixels, without classes.
_base_ = ['../_base_/tasks/diffusion.py']

model = dict(
    data_preprocessor=dict(to_rgb=False),  # the files have this order
    backbone=dict(type='vmamba_mm.DiS', drop_path_rate=0.1,
                  arch=dict(base='small_p2', in_channels=3, num_classes=0)))

dataset = dict(type='mmpretrain.CIFAR10', data_root='data/cifar10', split='train')
pipeline = [dict(type='mmpretrain.PackInputs')]
train_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=[dict(type='RandomFlip', prob=0.5, direction='horizontal'), *pipeline],
                 **dataset))
val_dataloader = dict(
    batch_size=64, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=pipeline, **dataset))
test_dataloader = val_dataloader
