_base_ = ['_base_/aid_224.py']

model = dict(
    backbone=dict(arch='huge'),
    head=dict(in_channels=320))
