# ImageNet-1K at 576x576, 10 epochs from the model at 448: the rate stays near its
# minimum, and there is hardly any decay.
_base_ = ['./imagenet_224.py']

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 576
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 658
test_pipeline[2].crop_size = 576
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Published as 5e-6 for 512 images, with 1e-6 at the beginning and 5e-6 at the end.
optim_wrapper = dict(clip_grad=None, optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.2, by_epoch=True, begin=0, end=2),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=True, begin=2, end=10),
]
train_cfg = dict(max_epochs=10)
