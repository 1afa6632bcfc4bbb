# At 256x256; images are resized to 292 for a crop.
_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='m4'),
    head=dict(in_channels=[224, 320, 512, 512]))

train_pipeline = [dict(step) for step in _base_.train_pipeline]
train_pipeline[1]['scale'] = 256
test_pipeline = [dict(step) for step in _base_.test_pipeline]
test_pipeline[1]['scale'] = 292
test_pipeline[2]['crop_size'] = 256
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
