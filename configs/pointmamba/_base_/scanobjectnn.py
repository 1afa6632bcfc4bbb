# ScanObjectNN: 15 classes of scanned objects, 2048 points of each, as they are in the files. The
# leaf names the variant.
#
#     data/scanobjectnn/main_split/training_objectdataset.h5 and test_objectdataset.h5 (OBJ_BG),
#     the same in main_split_nobg (OBJ_ONLY), and
#     main_split/training_objectdataset_augmentedrot_scale75.h5 ... (PB_T50_RS)
_base_ = ['./runtime.py']

model = dict(
    type='vmamba_mm.PointClassifier',
    data_preprocessor=dict(
        type='vmamba_mm.PointPreprocessor', num_points=2048, pool=2400,
        augments=[dict(type='rotate', axis='y')]),
    backbone=dict(type='vmamba_mm.PointMamba', out_type='raw'),
    head=dict(type='vmamba_mm.PointHead', in_channels=384, num_classes=15))

train_pipeline = [dict(type='vmamba_mm.LoadPoints', columns=3),
                  dict(type='vmamba_mm.SamplePoints'), dict(type='vmamba_mm.PackPoints')]
test_pipeline = [dict(type='vmamba_mm.LoadPoints', columns=3), dict(type='vmamba_mm.PackPoints')]
scans = dict(type='vmamba_mm.ScanObjectNN', data_root='data/scanobjectnn')
train_dataloader = dict(
    batch_size=32, num_workers=8, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(split='train', pipeline=train_pipeline, **scans))
val_dataloader = dict(
    batch_size=32, num_workers=4, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(split='test', pipeline=test_pipeline, test_mode=True, **scans))
test_dataloader = val_dataloader
val_evaluator = dict(type='vmamba_mm.PointAccuracy')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=5e-4))
