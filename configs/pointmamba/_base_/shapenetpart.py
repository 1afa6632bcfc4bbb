# ShapeNetPart: 16 categories of objects, 50 parts, 2048 points of each, drawn with replacement in
# the test too.
#
#     data/shapenetcore_partanno_segmentation_benchmark_v0_normal/synsetoffset2category.txt,
#     train_test_split/shuffled_train_file_list.json ... and 02691156/*.txt ...
_base_ = ['./runtime.py']

model = dict(
    type='vmamba_mm.PointSegmentor',
    data_preprocessor=dict(
        type='vmamba_mm.PointPreprocessor',
        augments=[dict(type='scale_shift', scale=(0.8, 1.25), shift=0.1, per_axis=False)]),
    backbone=dict(type='vmamba_mm.PointMamba', out_type='raw', out_indices=(3, 7, 11)),
    decode_head=dict(type='vmamba_mm.PartSegHead', in_channels=[384] * 3, num_classes=50,
                     num_categories=16))

pipeline = [dict(type='vmamba_mm.LoadPoints', columns=3, part_column=6, num_parts=50),
            dict(type='vmamba_mm.NormalizePoints'),
            dict(type='vmamba_mm.SamplePoints', num=2048, replace=True),
            dict(type='vmamba_mm.PackPoints')]
parts = dict(type='vmamba_mm.ShapeNetPart', pipeline=pipeline,
             data_root='data/shapenetcore_partanno_segmentation_benchmark_v0_normal')
train_dataloader = dict(
    batch_size=16, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(split='trainval', **parts))
val_dataloader = dict(
    batch_size=16, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='test', test_mode=True, **parts))
test_dataloader = val_dataloader
val_evaluator = dict(type='vmamba_mm.PartIoU')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 2e-4, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=300),
]
default_hooks = dict(checkpoint=dict(save_best='instance_miou'))
randomness = dict(seed=42)
auto_scale_lr = dict(base_batch_size=16)
