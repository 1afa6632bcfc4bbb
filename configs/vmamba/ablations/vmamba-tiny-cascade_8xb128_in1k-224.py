# Table 10: rows both ways, then columns both ways.
_base_ = ['../vmamba-tiny-s1l8_8xb128_in1k-224.py']

model = dict(backbone=dict(arch=dict(_delete_=True, base='tiny_s1l8', scan='cascade')))
