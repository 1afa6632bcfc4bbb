# T[s2l5] with ssm_ratio 1: step (e.2) of table 5, which T[s2l5] and T[s1l8] grew from.
_base_ = ['_base_/vmamba-tiny-s2l5.py']

model = dict(backbone=dict(arch=dict(ssm_ratio=1.0)))
