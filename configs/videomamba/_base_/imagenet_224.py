# ImageNet-1K at 224x224: DeiT's recipe (arXiv 2012.12877) in bf16, without averaged weights, 300
# epochs; these are the values of small, 8 GPUs x 512 images.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the head's in_channels.
    backbone=dict(_delete_=True, type='vmamba_mm.VideoMamba', out_type='cls_token'),
    neck=None)

# Repeated augmentation: each image comes three times, and an epoch has a third of all images.
train_dataloader = dict(batch_size=512, sampler=dict(_delete_=True, type='RepeatAugSampler'))

optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0,
    # Published as 5e-4 for 512 images.
    optimizer=dict(lr=4e-3, weight_decay=0.05),
    # The published rule: no decay of 1-D parameters, of biases, and of these; A_log and A_b_log, of
    # two dimensions, ARE decayed.
    paramwise_cfg=dict(custom_keys={
        'pos_embed': dict(decay_mult=0.), 'cls_token': dict(decay_mult=0.)}))
auto_scale_lr = dict(base_batch_size=4096)

# 1e-6 -> lr -> 1e-5, whatever the batch; the rate changes with the epoch
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-4, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]
custom_hooks = []  # no averaged weights

# Accuracies were measured in bf16; in fp32 they are not lower.
val_cfg = dict(fp16=False)
test_cfg = dict(fp16=False)
