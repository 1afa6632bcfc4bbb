# Semantic FPN on ADE20K at 512x512, 8 GPUs x 2 images, 80k iterations: the stock model and data
# with AdamW. The leaf names the backbone and the neck's in_channels.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../vmamba_mm.py',
]

crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor, pretrained=None, decode_head=dict(num_classes=150))
train_dataloader = dict(batch_size=2)

optim_wrapper = dict(
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4,
                   fused=True))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000)]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='mIoU', rule='greater'))
auto_scale_lr = dict(enable=False, base_batch_size=16)
