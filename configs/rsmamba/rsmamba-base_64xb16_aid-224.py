_base_ = ['_base_/aid_224.py']

model = dict(
    backbone=dict(arch='base'),
    head=dict(in_channels=192))
