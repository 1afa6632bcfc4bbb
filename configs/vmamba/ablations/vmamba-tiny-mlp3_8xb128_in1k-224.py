# Table 14: a narrower MLP, a wider SS2D.
_base_ = ['../vmamba-tiny-s1l8_8xb128_in1k-224.py']

model = dict(backbone=dict(
    arch=dict(_delete_=True, base='tiny_s1l8', mlp_ratio=3.0, ssm_ratio=1.5)))
