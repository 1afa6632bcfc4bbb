_base_ = ['_base_/mask-rcnn_adapter_fpn_1x_coco.py']

model = dict(
    # The published one started from a classifier of ImageNet-22K: README.md has its address.
    backbone=dict(arch='large', drop_path_rate=0.4),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]))
