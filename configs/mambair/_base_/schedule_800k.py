max_iters = 800_000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
param_scheduler = [
    dict(type='MultiStepLR', by_epoch=False, gamma=0.5,
         milestones=[400000, 600000, 700000, 750000])]
