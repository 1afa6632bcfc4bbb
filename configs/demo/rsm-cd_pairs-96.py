# `make demo-change`: a small RSM-CD on pairs of photographs of 96x96 pixels, in tiles of 64. The
# model, the losses and the metric are those of LEVIR-CD, and the weights are random ones at first,
# as there.
_base_ = ['../rs_mamba/rsm-cd-tiny_1xb32-300e_levir-cd-256x256.py']

crop_size, dims = (64, 64), [24, 48, 96, 192]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, base='tiny', embed_dims=dims[0], depths=(1, 1, 1, 1), d_state=1,
                  ssm_ratio=1.0, mlp_ratio=2.0),
        drop_path_rate=0.0),
    neck=dict(in_channels=dims),
    decode_head=dict(in_channels=dims),
    # Tiles that overlap by half.
    test_cfg=dict(crop_size=crop_size, stride=(32, 32)))

train_pipeline = [
    *_base_.load,
    dict(type='vmamba_mm.SwapImages', prob=0.5),
    dict(type='ConcatCDInput'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=[1 / 6] * 3, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='vmamba_mm.RandomTranspose', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(
    times=1, dataset=dict(data_root='data/demo/pairs', pipeline=train_pipeline)))
val_dataloader = dict(num_workers=1, dataset=dict(data_root='data/demo/pairs'))
test_dataloader = dict(num_workers=1, dataset=dict(
    data_root='data/demo/pairs',
    data_prefix=dict(img_path='val/A', img_path2='val/B', seg_map_path='val/label')))

max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_begin=1, val_interval=max_epochs // 3)
# fp32 on every machine, so that CPU and GPU give the same numbers
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3, weight_decay=1e-3),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=1, end=max_epochs,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_best=None))
