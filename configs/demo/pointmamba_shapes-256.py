# `make demo-points`: a small PointMamba on clouds of 8 made-up solids, 256 points of each. The
# model, the losses and the pipeline are those of ModelNet40; the weights are random ones at first.
_base_ = ['../pointmamba/pointmamba_1xb32-300e_modelnet40.py']

model = dict(
    data_preprocessor=dict(num_points=256, pool=320, augments=[dict(type='rotate', axis='y')]),
    backbone=dict(
        arch=dict(_delete_=True, base='hilbert_g64', embed_dims=64, depth=4, num_groups=24,
                  group_size=12),
        drop_path_rate=0.0, init_cfg=None),
    head=dict(in_channels=64, num_classes=8, drop_rate=0.2))

root = 'data/demo/shapes'
train_dataloader = dict(batch_size=16, num_workers=1, dataset=dict(data_root=root))
val_dataloader = dict(batch_size=50, num_workers=1, dataset=dict(data_root=root))
test_dataloader = val_dataloader

max_epochs = 9
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=1, end=max_epochs,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_best=None))
