# `make demo-sr`: a small lightweight MambaIR, super-resolution by 2, on the photographs of pip
# packages. The pipeline is the published one with smaller patches.
_base_ = ['../mambair/_base_/div2k_x2.py']

model = dict(backbone=dict(
    type='vmamba_mm.MambaIR',
    arch=dict(base='light_x2', embed_dims=32, depths=(1, 1), d_state=1, ssm_ratio=1.0)))

for step in _base_.train_pipeline:
    if step.type == 'vmamba_mm.PatchOfPair':
        step.size = 48
del step
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(
    data_root='data/demo/photographs/train', gt='HR', lq='LR', pipeline=_base_.train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(
    data_root='data/demo/photographs/val', gt='HR', lq='LR'))
test_dataloader = val_dataloader

max_iters = 900
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 3)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.04, by_epoch=False, begin=0, end=90),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=90, end=max_iters, eta_min=0.0),
]
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1, save_best=None))
