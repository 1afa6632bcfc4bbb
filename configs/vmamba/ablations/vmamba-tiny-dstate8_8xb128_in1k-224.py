# Table 12: d_state 8; ssm_ratio 1.5 keeps the cost alike.
_base_ = ['../vmamba-tiny-s2l5_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(_delete_=True, base='tiny_s2l5', d_state=8, ssm_ratio=1.5)))
