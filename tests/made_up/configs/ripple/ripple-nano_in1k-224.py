_base_ = ['vmamba_mm::_base_/tasks/imagenet_224.py']

model = dict(
    backbone=dict(_delete_=True, type='vmamba_mm.Ripple', arch='nano'),
    head=dict(in_channels=16))
