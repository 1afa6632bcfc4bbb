# The early version on ModelNet40, pre-trained on ShapeNet-55.
_base_ = ['_base_/modelnet40.py']

model = dict(
    backbone=dict(arch='axes_g64', drop_path_rate=0.3,
                  init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint='vmamba_mm://pointmamba/axes_g64.shapenet55')))
