# Image restoration on mmengine's Runner: Adam, no warm-up, no weight decay, validation every 5000
# batches. A schedule names iterations and milestones, a task its data and pipelines, and the leaf
# the network and the rate.
_base_ = ['../vmamba_mm.py']

default_scope = 'mmengine'
model = dict(type='vmamba_mm.ImageRestorer', loss='l1', test_cfg=dict(tile=200))

data = dict(type='vmamba_mm.RestorationDataset', data_root='data')
train_dataloader = dict(
    batch_size=4, num_workers=6, persistent_workers=True, drop_last=True,
    sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dict(**data))
val_dataloader = dict(
    batch_size=1, num_workers=2, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(test_mode=True, **data))
test_dataloader = dict(
    batch_size=1, num_workers=2, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(test_mode=True, **data))

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0))

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=200, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=2,
                    save_best='psnr', rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
log_processor = dict(by_epoch=False)
randomness = dict(seed=10)
