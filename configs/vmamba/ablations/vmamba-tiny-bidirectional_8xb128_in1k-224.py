# Table 10: two routes row-major, two the reverse.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(scan='bidirectional')))
