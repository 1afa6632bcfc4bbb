# Table 14: a narrower MLP, a wider SS2D.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(mlp_ratio=2.0, ssm_ratio=2.5)))
