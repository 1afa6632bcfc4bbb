_base_ = ['_base_/upernet_adapter_160k_ade20k-512x512.py']

model = dict(
    # The published one started from a classifier of ImageNet-22K: README.md has its address.
    backbone=dict(arch='large', drop_path_rate=0.4),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024]),
    auxiliary_head=dict(in_channels=1024))
