# Table 11: A_logs start at zero.
_base_ = ['../vmamba-tiny-s1l8_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(_delete_=True, base='tiny_s1l8', ssm_init='zero')))
