# The authors published no recipe of base: this is that of small.
_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.05),
    head=dict(in_channels=768))
