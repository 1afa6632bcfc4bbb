# Table 11: A_logs start at zero.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(ssm_init='zero')))
