# Table 10: no depthwise convolution; rows both ways, then columns both ways.
_base_ = ['vmamba-tiny-no-dwconv_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(scan='cascade')))
