# Table 10: no depthwise convolution before the cross scan.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(conv_kernel=0)))
