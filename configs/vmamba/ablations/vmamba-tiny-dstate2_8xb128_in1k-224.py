# Table 12: d_state 2.
_base_ = ['_base_/vmamba-tiny-s2l5.py']

model = dict(backbone=dict(arch=dict(d_state=2)))
