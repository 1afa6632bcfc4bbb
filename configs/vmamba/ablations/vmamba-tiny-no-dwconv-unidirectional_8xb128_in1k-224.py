# Table 10: no depthwise convolution; all four routes row-major.
_base_ = ['vmamba-tiny-no-dwconv_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(scan='unidirectional')))
