max_iters = 1600_000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=False, gamma=0.5,
         milestones=[800000, 1200000, 1400000, 1500000])]
