# ImageNet-1K at 224x224, 8 GPUs x 256 images: the published recipe, with MESA. 300 epochs, of which
# 20 are the warm-up, and 10 more at the lowest rate.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch, and the head's in_channels: those of the stages, and the last again.
    backbone=dict(
        _delete_=True, type='vmamba_mm.EfficientViM', out_indices=(2, ), with_states=True),
    neck=None,
    head=dict(
        _delete_=True, type='vmamba_mm.StageFusionHead', num_classes=1000,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')))

train_dataloader = dict(batch_size=256)

# 2e-6 -> 2e-3 -> 2e-5. The published norms have more than one dimension: their factors have decay.
optim_wrapper = dict(
    optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=0.02),
    paramwise_cfg=dict(custom_keys={
        name: dict(decay_mult=1.) for name in (
            'blocks.0.norm.weight', 'blocks.1.norm.weight', 'blocks.2.norm.weight',
            'blocks.3.norm.weight', 'backbone.norm0.weight', 'backbone.norm1.weight',
            'backbone.norm2.weight', 'backbone.norm3.weight')}))
auto_scale_lr = dict(base_batch_size=2048)
train_cfg = dict(max_epochs=310)

# The averages are of batch norms' statistics too (timm's ModelEma). MESA begins with epoch 75.
custom_hooks = [
    dict(type='EMAHook', momentum=5e-4, update_buffers=True, priority='ABOVE_NORMAL'),
    dict(type='vmamba_mm.MESAHook', value=1.0, begin=74.5 / 310)]
