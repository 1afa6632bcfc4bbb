# Parts of objects by the early version, from random weights.
_base_ = ['_base_/shapenetpart.py']

model = dict(
    backbone=dict(arch='axes_g128', drop_path_rate=0.2))
