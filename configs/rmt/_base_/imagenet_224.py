# ImageNet-1K at 224x224, 8 GPUs x 256 images: DeiT's recipe. The published script says 8 x 128, and
# all published logs have the rate of 2048 images, 2e-3.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate.
    backbone=dict(_delete_=True, type='vmamba_mm.RMT', out_indices=(3, ), projection=1024),
    head=dict(in_channels=1024))

# Each image three times in a batch, each time with another augmentation.
train_dataloader = dict(batch_size=256, sampler=dict(_delete_=True, type='RepeatAugSampler'))

optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=None)
auto_scale_lr = dict(base_batch_size=2048)
# 1e-6 -> 2e-3 -> 1e-5, epoch by epoch
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-4, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=5, end=300),
]

# 0.99996 for 512 images: to the fourth power. Statistics of batch norms are averaged too, as by
# timm's ModelEma.
custom_hooks = [
    dict(type='EMAHook', momentum=1.6e-4, update_buffers=True, priority='ABOVE_NORMAL')]
sync_bn = 'torch'
