_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4))
