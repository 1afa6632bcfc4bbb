# Tumours in MRI of the brain, BraTS 2023 (GLI): four kinds of images of a patient, three kinds of
# tissue, patches of 128x128x128 voxels. The folders are those of the challenge's archive:
#
#     data/brats2023/BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2w.nii.gz   and -t2f, -t1n, -t1c, -seg
#
# MONAI reads and augments, mmengine trains: 1000 epochs of 250 batches of 2 patches, on one GPU.
_base_ = ['../vmamba_mm.py']

default_scope = 'mmengine'
patch_size = (128, 128, 128)
num_classes = 4  # background, necrotic core (NCR), oedema (ED), enhancing tumour (ET)
keys = ['image', 'label']

# The leaf names backbone and decode_head.
model = dict(
    type='vmamba_mm.VolumeSegmentor', loss='ce',
    data_preprocessor=dict(type='vmamba_mm.VolumePreprocessor'),
    test_cfg=dict(patch_size=patch_size, overlap=0.5, mode='gaussian', sw_batch_size=2,
                  mirror_axes=(0, 1, 2)))

# One orientation, voxels of 1 mm, and axial slices along the first axis.
load = [
    dict(type='Orientationd', keys=keys, axcodes='RAS'),
    dict(type='Spacingd', keys=keys, pixdim=(1.0, 1.0, 1.0), mode=('bilinear', 'nearest')),
    dict(type='Transposed', keys=keys, indices=(0, 3, 2, 1)),
]
normalise = [dict(type='NormalizeIntensityd', keys='image', nonzero=True, channel_wise=True)]
train_transforms = [
    *load,
    dict(type='CropForegroundd', keys=keys, source_key='image', allow_smaller=True),
    *normalise,
    dict(type='SpatialPadd', keys=keys, spatial_size=patch_size),
    # A third of the patches are around a voxel of the tumour, as nnU-Net takes them.
    dict(type='RandCropByPosNegLabeld', keys=keys, label_key='label', spatial_size=patch_size,
         pos=1.0, neg=2.0, num_samples=1),
    dict(type='RandRotated', keys=keys, range_x=0.524, range_y=0.524, range_z=0.524, prob=0.2,
         mode=('bilinear', 'nearest'), padding_mode='zeros'),
    dict(type='RandZoomd', keys=keys, min_zoom=0.7, max_zoom=1.4, prob=0.2,
         mode=('trilinear', 'nearest'), padding_mode='constant'),
    dict(type='RandGaussianNoised', keys='image', prob=0.1, std=0.3),
    dict(type='RandGaussianSmoothd', keys='image', prob=0.2, sigma_x=(0.5, 1.0),
         sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
    dict(type='RandScaleIntensityd', keys='image', factors=0.25, prob=0.15),
    dict(type='RandAdjustContrastd', keys='image', prob=0.1, gamma=(0.7, 1.5), invert_image=True,
         retain_stats=True),
    dict(type='RandAdjustContrastd', keys='image', prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    dict(type='RandSimulateLowResolutiond', keys='image', prob=0.25, zoom_range=(0.5, 1.0)),
    *[dict(type='RandFlipd', keys=keys, prob=0.5, spatial_axis=axis) for axis in range(3)],
]
train_pipeline = [
    dict(type='vmamba_mm.LoadVolume'),
    dict(type='vmamba_mm.MonaiTransforms', transforms=train_transforms),
    dict(type='vmamba_mm.PackVolume', num_classes=num_classes),
]
# Nothing is cropped, so that every prediction has the size of its volume.
test_pipeline = [
    dict(type='vmamba_mm.LoadVolume'),
    dict(type='vmamba_mm.MonaiTransforms', transforms=[*load, *normalise]),
    dict(type='vmamba_mm.PackVolume', num_classes=num_classes),
]

brats = dict(
    type='vmamba_mm.VolumeDataset', data_root='data/brats2023', mask='{case}-seg.nii.gz',
    images=['{case}-t2w.nii.gz', '{case}-t2f.nii.gz', '{case}-t1n.nii.gz', '{case}-t1c.nii.gz'])
train_dataloader = dict(
    batch_size=2, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(split='train', pipeline=train_pipeline, **brats))
val_dataloader = dict(
    batch_size=1, num_workers=2, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='val', pipeline=test_pipeline, test_mode=True, **brats))
test_dataloader = dict(
    batch_size=1, num_workers=2, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='test', pipeline=test_pipeline, test_mode=True, **brats))

# Whole tumour, tumour core and enhancing tumour.
regions = dict(WT=[1, 2, 3], TC=[1, 3], ET=[3])
val_evaluator = dict(type='vmamba_mm.VolumeDice', regions=regions)
# A region that is in neither the mask nor the prediction counts as missed, as published.
test_evaluator = dict(
    type='vmamba_mm.VolumeDice', regions=regions, with_hd95=True, both_empty=(0.0, 50.0))

max_iters = 250_000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
val_cfg = dict(type='ValLoop', fp16=True)
test_cfg = dict(type='TestLoop', fp16=True)
optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale='dynamic',
    optimizer=dict(type='SGD', lr=1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5),
    clip_grad=dict(max_norm=12.0))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=max_iters)]

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=2,
                    save_best='dice', rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
log_processor = dict(by_epoch=False)
env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=123)
auto_scale_lr = dict(base_batch_size=2)
