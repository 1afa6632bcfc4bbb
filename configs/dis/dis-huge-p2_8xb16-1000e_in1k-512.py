_base_ = ['./_base_/in1k.py']

size = 512
model = dict(backbone=dict(arch=dict(base='huge_p2', image_size=64)))

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='vmamba_mm.HalvingCenterCrop', size=size),
    dict(type='mmpretrain.PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=[*pipeline[:-1], _base_.flip, pipeline[-1]]))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader
