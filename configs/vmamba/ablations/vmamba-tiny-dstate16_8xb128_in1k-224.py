# Table 12: d_state 16; ssm_ratio 1 keeps the cost alike.
_base_ = ['_base_/vmamba-tiny-s2l5.py']

model = dict(backbone=dict(arch=dict(d_state=16, ssm_ratio=1.0)))
