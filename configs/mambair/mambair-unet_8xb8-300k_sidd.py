# MambaIR's U-Net, real noise of SIDD. The patches of 512x512 pixels that the data are usually cut
# into lie in two folders under the same names. In training, patches grow from 128 to 384 pixels
# while batches shrink. The authors restore whole images; test_cfg.tile=400 needs less memory for
# large ones.
_base_ = ['../_base_/tasks/restoration.py']

max_iters = 300_000
train_pipeline = [
    dict(type='vmamba_mm.LoadPair'),
    dict(type='vmamba_mm.PatchOfPair', size=384),
    dict(type='vmamba_mm.TurnPair'),
    dict(type='vmamba_mm.PackPair'),
]
test_pipeline = [dict(type='vmamba_mm.LoadPair'), dict(type='vmamba_mm.PackPair')]
model = dict(backbone=dict(type='vmamba_mm.MambaIRUNet', arch='real_denoise'),
             test_cfg=dict(tile=0))
train_dataloader = dict(batch_size=8, dataset=dict(
    gt='SIDD/train/target_crops', lq='SIDD/train/input_crops', pipeline=train_pipeline))
sidd = dict(gt='SIDD/val/target_crops', lq='SIDD/val/input_crops', pipeline=test_pipeline)
val_dataloader = dict(dataset=sidd)
test_dataloader = dict(dataset=sidd)
val_evaluator = dict(type='vmamba_mm.RestorationMetric')
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=4000)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=0.01))  # as of Restormer
# The rate is constant at first.
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=False, begin=92_000, end=max_iters, eta_min=1e-6)]
custom_hooks = [
    dict(type='vmamba_mm.ProgressivePatches', batch_sizes=[8, 5, 4, 2, 1, 1],
         iters=[92_000, 64_000, 48_000, 36_000, 36_000, 24_000],
         patch_sizes=[128, 160, 192, 256, 320, 384]),
    dict(type='vmamba_mm.MixPairs', beta=1.2, prob=0.5),
]
default_hooks = dict(checkpoint=dict(interval=4000))
auto_scale_lr = dict(base_batch_size=64)
randomness = dict(seed=100)
