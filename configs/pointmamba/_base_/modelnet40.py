# ModelNet40: 40 classes, 9843 objects to train on and 2468 to measure, 1024 points of each.
#
#     data/modelnet40_normal_resampled/modelnet40_shape_names.txt, modelnet40_train.txt,
#     modelnet40_test.txt and airplane/airplane_0001.txt ...
#
# The public code trains on 8192 points of each, sampled beforehand, in
# modelnet40_train_8192pts_fps.dat and the same of the test: these are taken where they are there,
# and else all 10000.
_base_ = ['./runtime.py']

# The leaf names the arch. Voting: --cfg-options model.data_preprocessor.votes=10
model = dict(
    type='vmamba_mm.PointClassifier',
    data_preprocessor=dict(
        type='vmamba_mm.PointPreprocessor', num_points=1024, pool=1200,
        augments=[dict(type='scale_shift', scale=(2 / 3, 3 / 2), shift=0.2)]),
    backbone=dict(type='vmamba_mm.PointMamba', out_type='raw'),
    head=dict(type='vmamba_mm.PointHead', in_channels=384, num_classes=40))

load = [dict(type='vmamba_mm.LoadPoints', columns=3), dict(type='vmamba_mm.NormalizePoints')]
# Another order, as sampling begins with the first point.
train_pipeline = [*load, dict(type='vmamba_mm.SamplePoints'), dict(type='vmamba_mm.PackPoints')]
test_pipeline = [*load, dict(type='vmamba_mm.PackPoints')]
modelnet = dict(type='vmamba_mm.ModelNet40', data_root='data/modelnet40_normal_resampled')
train_dataloader = dict(
    batch_size=32, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(split='train', pipeline=train_pipeline, **modelnet))
val_dataloader = dict(
    batch_size=32, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='test', pipeline=test_pipeline, test_mode=True, **modelnet))
test_dataloader = val_dataloader
val_evaluator = dict(type='vmamba_mm.PointAccuracy')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 3e-4, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=300),
]
