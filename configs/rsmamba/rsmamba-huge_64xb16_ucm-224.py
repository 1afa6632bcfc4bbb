_base_ = ['_base_/ucm_224.py']

model = dict(
    backbone=dict(arch='huge'),
    head=dict(in_channels=320))
