_base_ = ['_base_/ucm_224.py']

model = dict(
    backbone=dict(arch='large'),
    head=dict(in_channels=256))
