# Table 15: ReLU after the depthwise convolution.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(act='relu')))
