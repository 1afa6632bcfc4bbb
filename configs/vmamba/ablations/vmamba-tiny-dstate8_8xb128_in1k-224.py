# Table 12: d_state 8; ssm_ratio 1.5 keeps the cost alike.
_base_ = ['_base_/vmamba-tiny-s2l5.py']

model = dict(backbone=dict(arch=dict(d_state=8, ssm_ratio=1.5)))
