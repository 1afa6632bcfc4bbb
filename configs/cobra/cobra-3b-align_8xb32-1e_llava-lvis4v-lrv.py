# The stage before, which the authors' code has and no published model went through: the projector
# alone, without decay, one epoch.
_base_ = ['_base_/conversations.py']

model = dict(stage='align')
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.))
max_epochs, warmup = 1, 0.03
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=warmup,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=True, begin=warmup, end=max_epochs,
         convert_to_iter_based=True)]
train_cfg = dict(max_epochs=max_epochs)
auto_scale_lr = dict(base_batch_size=256)
