# ImageNet-1K at 224x224, 8 GPUs x 128 images: DeiT's recipe, 5e-4 for 512 images. The published
# script has 128 images for a GPU, and says nothing of their number.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT', out_indices=(3, ), projection=1024),
    head=dict(in_channels=1024))

# Each image three times in a batch, each time with another augmentation.
train_dataloader = dict(sampler=dict(_delete_=True, type='RepeatAugSampler'))

optim_wrapper = dict(clip_grad=None)
# 1e-6 -> 1e-3 -> 1e-5, epoch by epoch; neither end scales with the batch
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=5, end=300),
]

# 0.99996 for 512 images: to the second power. Statistics of batch norms are averaged too, as by
# timm's ModelEma.
custom_hooks = [
    dict(type='EMAHook', momentum=8e-5, update_buffers=True, priority='ABOVE_NORMAL')]
sync_bn = 'torch'
