_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='m1'),
    head=dict(in_channels=[128, 192, 320, 320]))
