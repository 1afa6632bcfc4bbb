# The early version on ScanObjectNN OBJ_ONLY, pre-trained on ShapeNet-55, with rotations.
_base_ = ['_base_/scanobjectnn.py']

model = dict(
    backbone=dict(arch='axes_g128', drop_path_rate=0.1,
                  init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint='vmamba_mm://pointmamba/axes_g64.shapenet55')))

scan = dict(variant='obj_only')
train_dataloader = dict(dataset=scan)
val_dataloader = dict(dataset=scan)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 1e-4, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=300),
]
