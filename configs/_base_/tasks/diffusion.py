# Denoising diffusion on one machine, 128 images at a time, 1000 epochs; the leaf names the data set
# and the backbone. A test makes as many images as the data set has, of the same classes, and
# measures FID between the two.
_base_ = ['../vmamba_mm.py']

default_scope = 'mmengine'

# Images in [-1, 1].
data_preprocessor = dict(
    type='mmpretrain.ClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
model = dict(
    type='vmamba_mm.DiffusionModel', class_dropout=0.1,
    diffusion=dict(num_steps=1000, beta_start=1e-4, beta_end=0.02),
    data_preprocessor=data_preprocessor,
    # The sampler of the paper: DDPM in 250 steps, with the variance that was learned.
    test_cfg=dict(
        num_steps=250, guidance_scale=1.5, guided_channels=3,
        scheduler=dict(type='DDPMScheduler', variance_type='learned_range', clip_sample=False,
                       timestep_spacing='linspace')))

epochs = 1000
optim_wrapper = dict(
    type='OptimWrapper', clip_grad=dict(max_norm=1.0),
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.0))
param_scheduler = [
    # From (nearly) 0 to 1e-4, and down to 1e-6 by a cosine, at every iteration.
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=5, end=epochs,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]

# A validation makes 50,000 images or more: one at the end.
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
test_cfg = dict()
val_evaluator = dict(type='vmamba_mm.FrechetDistance')
test_evaluator = val_evaluator

default_hooks = dict(
    timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'))
env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=420, diff_rank_seed=True)
auto_scale_lr = dict(base_batch_size=128)
