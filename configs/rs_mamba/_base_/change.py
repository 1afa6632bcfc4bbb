# Pairs of images, in folders train, val and test with A, B and label, as LEVIR-CD comes. Each date
# goes through the one encoder.
_base_ = ['rsm.py']

model = dict(
    data_preprocessor=dict(type='vmamba_mm.ImagesDataPreProcessor', num_images=2),
    backbone=dict(num_images=2, drop_path_rate=0.2),
    neck=dict(type='vmamba_mm.ChannelFusion', in_channels=[96, 192, 384, 768], num_images=2))
load = [dict(type='vmamba_mm.LoadImagePair'), dict(type='vmamba_mm.LoadBinaryAnnotations')]
test_pipeline = [*load, dict(type='ConcatCDInput'), dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(
    type='RepeatDataset', times=16,
    dataset=dict(type='LEVIRCDDataset',
                 data_prefix=dict(img_path='train/A', img_path2='train/B',
                                  seg_map_path='train/label'),
                 pipeline=[*load, dict(type='vmamba_mm.SwapImages', prob=0.5),
                           dict(type='ConcatCDInput'), *_base_.augment])))
val_dataloader = dict(dataset=dict(
    type='LEVIRCDDataset',
    data_prefix=dict(img_path='val/A', img_path2='val/B', seg_map_path='val/label'),
    pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=1, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='LEVIRCDDataset',
        data_prefix=dict(img_path='test/A', img_path2='test/B', seg_map_path='test/label'),
        pipeline=test_pipeline))
