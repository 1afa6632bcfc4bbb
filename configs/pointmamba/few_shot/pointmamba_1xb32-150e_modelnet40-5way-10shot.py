# Few-shot classification on ModelNet40: 150 epochs on 10 clouds of each of 5 classes. The mean and
# the deviation of the ten folds are what papers compare. Another fold, and other tasks, are
#
#     --cfg-options train_dataloader.dataset.fold=3 val_dataloader.dataset.fold=3 \
#         test_dataloader.dataset.fold=3
#
# and likewise way (with model.head.num_classes; the public code keeps the 40 outputs of ModelNet40)
# and shot. The lists are those of the public code,
# data/ModelNetFewshot/5way_10shot/0.pkl ..., which have the points of each task; the config with
# 'drawn' in its name does without them.
_base_ = ['../_base_/modelnet40.py']

model = dict(
    backbone=dict(arch='hilbert_g64', drop_path_rate=0.5,
                  init_cfg=dict(type='Pretrained', prefix='backbone.',
                                checkpoint='vmamba_mm://pointmamba/hilbert_g64.shapenet55')),
    head=dict(num_classes=5))

task = dict(type='vmamba_mm.ModelNetFewShot', data_root='data/ModelNetFewshot', way=5, shot=10,
            fold=0)
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 5e-4, by_epoch=True, begin=0, end=11),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=11, end=150),
]
train_cfg = dict(max_epochs=150)
