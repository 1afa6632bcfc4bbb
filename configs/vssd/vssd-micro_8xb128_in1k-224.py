_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='micro', drop_path_rate=0.1),
    head=dict(in_channels=384))
