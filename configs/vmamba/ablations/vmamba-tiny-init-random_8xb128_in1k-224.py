# Table 11: A and dt_projs start at random.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(ssm_init='random')))
