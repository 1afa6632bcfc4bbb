# Folders train, val and test, each with image and label, whose masks are 0 where the class is not.
# A leaf names the class and the folder.
_base_ = ['rsm.py']

model = dict(data_preprocessor=dict(bgr_to_rgb=True), backbone=dict(drop_path_rate=0.1))
load = [dict(type='LoadImageFromFile'), dict(type='vmamba_mm.LoadBinaryAnnotations')]
train_dataloader = dict(dataset=dict(
    type='RepeatDataset', times=16,
    dataset=dict(type='BaseSegDataset', img_suffix='.png', seg_map_suffix='.png',
                 data_prefix=dict(img_path='train/image', seg_map_path='train/label'),
                 pipeline=[*load, *_base_.augment])))
val_dataloader = dict(dataset=dict(
    type='BaseSegDataset', img_suffix='.png', seg_map_suffix='.png',
    data_prefix=dict(img_path='val/image', seg_map_path='val/label'),
    pipeline=[*load, dict(type='PackSegInputs')]))
test_dataloader = dict(
    batch_size=1, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset', img_suffix='.png', seg_map_suffix='.png',
        data_prefix=dict(img_path='test/image', seg_map_path='test/label'),
        pipeline=[*load, dict(type='PackSegInputs')]))
