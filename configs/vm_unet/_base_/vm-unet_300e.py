# VM-UNet, 300 epochs on one GPU x 32 images, in fp32. Both halves start from VMamba, vanilla_small.
_base_ = ['mmseg::_base_/default_runtime.py', '../../_base_/vmamba_mm.py']

# The leaf names the classes, the losses and the size.
data_preprocessor = dict(
    type='SegDataPreProcessor', bgr_to_rgb=True, pad_val=0, seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='vmamba_mm.VMUNet',
        arch='l2',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vmamba/vanilla_small', prefix='backbone.',
            from_vmamba=True)),
    # The published model's last layer, a 1x1 convolution.
    decode_head=dict(
        type='FCNHead', in_channels=24, channels=24, num_convs=0, concat_input=False,
        dropout_ratio=0.0, align_corners=False),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))

# All parameters decay, biases and norms as well.
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-2))

train_dataloader = dict(
    batch_size=32, num_workers=4, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=1, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=32)

log_processor = dict(by_epoch=True)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=10, max_keep_ckpts=3, save_best='mDice',
                    rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
randomness = dict(seed=42)
