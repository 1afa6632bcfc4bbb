# Something-Something v2: as Kinetics-400, but for the classes, a test on 2 clips x 3 crops, twice
# the rate, and no flip, because left and right are in the names of classes.
_base_ = ['./video_k400.py']

model = dict(head=dict(num_classes=174))
data_preprocessor = dict(num_classes=174)

augment = [step for step in _base_.augment if step.type != 'vmamba_mm.RandomFlip']
train_pipeline = _base_.train_pipeline
train_pipeline[1].transforms[0].transforms = augment
test_pipeline = _base_.test_pipeline
# The published test takes the first frame of each segment, and the one in its middle.
test_pipeline[0].update(num_clips=2, offsets=(0.0, 0.5))

root = dict(data_root='data/sthv2')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **root))
val_dataloader = dict(dataset=dict(**root))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, **root))

max_epochs = 35
train_cfg = dict(max_epochs=max_epochs)
# Published as 4e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=2.5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=2.5e-3, by_epoch=True, begin=5, end=max_epochs,
         convert_to_iter_based=True),
]
