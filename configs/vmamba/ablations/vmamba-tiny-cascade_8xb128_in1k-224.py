# Table 10: rows both ways, then columns both ways.
_base_ = ['_base_/vmamba-tiny-s1l8.py']

model = dict(backbone=dict(arch=dict(scan='cascade')))
