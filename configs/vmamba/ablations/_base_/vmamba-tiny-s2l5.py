# T[s2l5], likewise.
_base_ = ['vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(ssm_ratio=2.0, depths=(2, 2, 5, 2))))
