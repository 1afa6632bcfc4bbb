# Parts of objects by the early version, pre-trained on ShapeNet-55.
_base_ = ['_base_/shapenetpart.py']

model = dict(
    backbone=dict(arch='axes_g128', drop_path_rate=0.2,
                  init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint='vmamba_mm://pointmamba/axes_g64.shapenet55')))
