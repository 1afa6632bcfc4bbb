# Table 10: all four routes row-major.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(scan='unidirectional')))
