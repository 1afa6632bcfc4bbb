# Table 10: no depthwise convolution; all four routes row-major.
_base_ = ['../vmamba-tiny-s1l8_8xb128_in1k-224.py']

model = dict(backbone=dict(
    arch=dict(_delete_=True, base='tiny_s1l8', conv_kernel=0, scan='unidirectional')))
