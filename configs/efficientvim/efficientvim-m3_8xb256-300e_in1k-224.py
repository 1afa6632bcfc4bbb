_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='m3'),
    head=dict(in_channels=[224, 320, 512, 512]))
