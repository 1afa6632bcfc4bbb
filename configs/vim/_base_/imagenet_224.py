# ImageNet-1K at 224x224: DeiT's recipe (arXiv 2012.12877), 300 epochs, in fp32; these are the
# values of small, 8 GPUs x 64 images.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the head's in_channels.
    backbone=dict(_delete_=True, type='vmamba_mm.Vim', out_type='cls_token'),
    neck=None)

# Repeated augmentation: each image comes three times, and an epoch has a third of all images.
train_dataloader = dict(batch_size=64, sampler=dict(_delete_=True, type='RepeatAugSampler'))

optim_wrapper = dict(
    # Published runs had no mixed precision: the code gives NaN with it, which ours does not.
    type='OptimWrapper', clip_grad=None,
    # Published as 1e-3 for 512 images.
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    # The published rule: no decay of 1-D parameters, of biases, and of these; A_log and A_b_log, of
    # two dimensions, ARE decayed.
    paramwise_cfg=dict(custom_keys={
        'pos_embed': dict(decay_mult=0.), 'cls_token': dict(decay_mult=0.)}))
auto_scale_lr = dict(base_batch_size=512)

# 1e-6 -> 1e-3 -> 1e-5, whatever the batch; the rate changes with the epoch. The published cosine
# counts the epochs of the warm-up, and every step comes an epoch late.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300),
]

# Published accuracies are those of the raw weights; mmengine saves the averages as the model's.
custom_hooks = [dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL')]

val_cfg = dict(fp16=False)
test_cfg = dict(fp16=False)
