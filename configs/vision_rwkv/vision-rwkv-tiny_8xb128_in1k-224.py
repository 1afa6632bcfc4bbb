_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='tiny'),
    head=dict(in_channels=192),
    # Published without Mixup and CutMix.
    train_cfg=None)
