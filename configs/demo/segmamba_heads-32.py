# `make demo-medical`: a small SegMamba on made-up heads of 64x64x32 voxels, in patches of half of
# each side. The pipeline is that of BraTS without its augmentations but for mirror images.
_base_ = ['../seg_mamba/segmamba_1xb2-1000e_brats2023-128x128x128.py']

patch_size, num_classes, keys = (32, 32, 32), 3, ['image', 'label']
dims = (8, 16, 24, 32)
model = dict(
    loss='dice_ce',
    # The slices that a map has: the published numbers are of patches that are 128 deep.
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=dims, depths=(1, 1, 1, 1), d_state=4,
                  num_slices='depth'),
        in_channels=1),
    decode_head=dict(in_channels=list(dims), image_channels=1, num_classes=3, hidden_dims=48),
    test_cfg=dict(patch_size=patch_size, mirror_axes=(), sw_batch_size=4))

order = [dict(type='Transposed', keys=keys, indices=(0, 3, 2, 1))]
train_pipeline = [
    dict(type='vmamba_mm.LoadVolume'),
    dict(type='vmamba_mm.MonaiTransforms', transforms=[
        *order, *_base_.normalise,
        dict(type='RandCropByPosNegLabeld', keys=keys, label_key='label',
             spatial_size=patch_size, pos=1.0, neg=1.0, num_samples=1),
        *[dict(type='RandFlipd', keys=keys, prob=0.5, spatial_axis=axis) for axis in range(3)]]),
    dict(type='vmamba_mm.PackVolume', num_classes=num_classes),
]
test_pipeline = [
    dict(type='vmamba_mm.LoadVolume'),
    dict(type='vmamba_mm.MonaiTransforms', transforms=[*order, *_base_.normalise]),
    dict(type='vmamba_mm.PackVolume', num_classes=num_classes),
]
heads = dict(_delete_=True, type='vmamba_mm.VolumeDataset', images=['{case}.nii.gz'],
             mask='{case}_mask.nii.gz')
train_dataloader = dict(num_workers=1, dataset=dict(
    data_root='data/demo/heads/train', pipeline=train_pipeline, **heads))
val_dataloader = dict(num_workers=1, dataset=dict(
    data_root='data/demo/heads/val', pipeline=test_pipeline, test_mode=True, **heads))
test_dataloader = val_dataloader
val_evaluator = dict(regions=dict(_delete_=True, ventricles=[1], tumour=[2]))
test_evaluator = dict(_delete_=True, type='vmamba_mm.VolumeDice',
                      regions=dict(ventricles=[1], tumour=[2]))

max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 2)
# fp32 on every machine, so that CPU and GPU give the same numbers
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=0.9, begin=20, end=max_iters, by_epoch=False),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_iters, max_keep_ckpts=1, save_best=None))
