# RSM-SS and RSM-CD as published (arXiv 2404.02668 and its code): one logit for one class,
# cross-entropy and Dice 1:1, AdamW 1e-3 with 1000 steps of warm-up, a tenth of the rate after 12
# evaluations without a better F1, fp16, 300 epochs, one GPU with 2 images of 16 tiles each.
_base_ = ['mmseg::_base_/default_runtime.py', '../../_base_/vmamba_mm.py']

crop_size = (256, 256)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
        pad_val=0, seg_pad_val=255, size=crop_size),
    backbone=dict(type='vmamba_mm.RemoteSensingMamba', arch='tiny'),
    decode_head=dict(
        type='vmamba_mm.ConcatDecodeHead', in_channels=[96, 192, 384, 768], num_classes=2,
        out_channels=1, threshold=0.5,
        loss_decode=[
            dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True, avg_non_ignore=True),
            dict(type='vmamba_mm.DiceLoss', per_image=False, smooth=1e-5)]),
    # Tiles without overlap, as published; the last ones of a row and a column are moved back into
    # the image.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=crop_size))

augment = [
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=[1 / 6] * 3, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='vmamba_mm.RandomTranspose', prob=0.5),
    dict(type='PackSegInputs')]

train_dataloader = dict(
    batch_size=32, num_workers=8, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True), drop_last=True)
val_dataloader = dict(
    batch_size=1, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False))

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=300, val_begin=10, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
val_evaluator = dict(type='vmamba_mm.ForegroundMetric')
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-3),
    clip_grad=dict(max_norm=1))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=False, end=1000),
    dict(type='ReduceOnPlateauLR', monitor='F1', rule='greater', factor=0.1, patience=12)]

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=5, max_keep_ckpts=3, save_best='F1',
                    rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
log_processor = dict(by_epoch=True)
randomness = dict(seed=42)
