_base_ = ['_base_/resisc45_224.py']

model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=192))
