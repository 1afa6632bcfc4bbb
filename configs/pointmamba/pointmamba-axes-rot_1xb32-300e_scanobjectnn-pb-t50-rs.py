# The early version on ScanObjectNN PB_T50_RS, pre-trained on ShapeNet-55, with rotations.
_base_ = ['_base_/scanobjectnn.py']

model = dict(
    backbone=dict(arch='axes_g128', drop_path_rate=0.1,
                  init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint='vmamba_mm://pointmamba/axes_g64.shapenet55')))

scan = dict(variant='pb_t50_rs')
train_dataloader = dict(dataset=scan)
val_dataloader = dict(dataset=scan)
test_dataloader = val_dataloader
