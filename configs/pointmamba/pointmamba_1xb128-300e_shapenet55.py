# Masked pre-training of the released version.
_base_ = ['_base_/shapenet55.py']

model = dict(
    decoder_drop_path_rate=0.1,
    backbone=dict(arch='hilbert_g64', drop_path_rate=0.1))
