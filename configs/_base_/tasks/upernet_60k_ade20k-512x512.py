# UperNet on a backbone of one stride, on ADE20K at 512x512, 4 GPUs x 8 images, 60k iterations: the
# stock model and data of BEiT, with the recipe of Vim (AdamW, fp32, no clipping).
_base_ = [
    'mmseg::_base_/models/upernet_beit.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../vmamba_mm.py',
]

crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)))
train_dataloader = dict(batch_size=8, num_workers=8)

optim_wrapper = dict(
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05,
                   fused=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=60000),
]
train_cfg = dict(max_iters=60000, val_interval=1000)
# Published numbers are those of the best validation.
default_hooks = dict(
    checkpoint=dict(interval=1000, max_keep_ckpts=4, save_best='mIoU', rule='greater'))
auto_scale_lr = dict(enable=False, base_batch_size=32)
