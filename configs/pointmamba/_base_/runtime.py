# Clouds of points on one GPU in fp32: 300 epochs of AdamW, the rate by epochs, a test after each,
# whose best is kept: that is what was published, and it was chosen by the test set.
_base_ = ['../../_base_/vmamba_mm.py']

default_scope = 'mmengine'
max_epochs = 300

# The leaf, or the base of the data, names the rate, which rises from 1e-6 in ten epochs. No decay
# of 1-D parameters, biases and tokens; A_log is decayed.
optim_wrapper = dict(
    type='OptimWrapper', constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.,
        custom_keys={'cls_token': dict(decay_mult=0.), 'mask_token': dict(decay_mult=0.)}),
    clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 5e-4, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=max_epochs),
]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=2, save_best='accuracy',
                    rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
randomness = dict(seed=0)
auto_scale_lr = dict(base_batch_size=32)
