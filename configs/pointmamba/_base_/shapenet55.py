# Masked pre-training on ShapeNet-55, 1024 random points of each of 41952 objects.
#
#     data/shapenet55/ShapeNet-55/train.txt and test.txt, and shapenet_pc/02691156-*.npy ...
#
# The test measures the Chamfer distance of what was masked. (The public code would train an SVM on
# the features, which its model does not give.)
_base_ = ['./runtime.py']

# The leaf names the arch, and the drop path of the decoder.
model = dict(
    type='vmamba_mm.MaskedPointMamba', decoder_depth=4, mask_ratio=0.6, mask_type='rand',
    loss='cdl2',
    data_preprocessor=dict(type='vmamba_mm.PointPreprocessor',
                           augments=[dict(type='rotate', axis='y')]),
    backbone=dict(type='vmamba_mm.PointMamba', out_type='raw'))

pipeline = [dict(type='vmamba_mm.LoadPoints', columns=3),
            dict(type='vmamba_mm.SamplePoints', num=1024), dict(type='vmamba_mm.NormalizePoints'),
            dict(type='vmamba_mm.PackPoints')]
shapenet = dict(type='vmamba_mm.ShapeNet55', data_root='data/shapenet55', pipeline=pipeline)
train_dataloader = dict(
    batch_size=128, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True), dataset=dict(split='train', **shapenet))
val_dataloader = dict(
    batch_size=128, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='test', test_mode=True, **shapenet))
test_dataloader = val_dataloader
val_evaluator = dict(type='vmamba_mm.RebuiltDistance')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=300),
]
train_cfg = dict(val_interval=10)
default_hooks = dict(checkpoint=dict(save_best=None))
auto_scale_lr = dict(base_batch_size=128)
