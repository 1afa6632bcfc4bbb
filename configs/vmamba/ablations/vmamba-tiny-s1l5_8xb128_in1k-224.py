# T[s2l5] with ssm_ratio 1: step (e.2) of table 5, which T[s2l5] and T[s1l8] grew from.
_base_ = ['../vmamba-tiny-s2l5_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(_delete_=True, base='tiny_s2l5', ssm_ratio=1.0)))
