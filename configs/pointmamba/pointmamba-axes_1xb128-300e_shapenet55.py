# Masked pre-training of the early version.
_base_ = ['_base_/shapenet55.py']

model = dict(
    decoder_drop_path_rate=0.1,
    data_preprocessor=dict(augments=[dict(type='scale_shift', scale=(2 / 3, 3 / 2), shift=0.2)]),
    backbone=dict(arch='axes_g64', drop_path_rate=0.1))
