# Table 15: GELU after the depthwise convolution.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(act='gelu')))
