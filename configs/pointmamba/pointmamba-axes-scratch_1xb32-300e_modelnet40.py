# The early version on ModelNet40, from random weights.
_base_ = ['_base_/modelnet40.py']

model = dict(
    backbone=dict(arch='axes_g64', drop_path_rate=0.3))
