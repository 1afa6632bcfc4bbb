# Table 10: no depthwise convolution; two routes row-major, two the reverse.
_base_ = ['vmamba-tiny-no-dwconv_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(scan='bidirectional')))
