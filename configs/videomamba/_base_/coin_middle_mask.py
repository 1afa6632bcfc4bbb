# The published recipe of middle on COIN, from Kinetics-400 and masked pre-training before it.
# A leaf config names frames, batch and weights; the lists are as those of Kinetics-400.
_base_ = ['./k400_middle_mask.py']

model = dict(head=dict(num_classes=180))
data_preprocessor = dict(num_classes=180)

test_pipeline = _base_.test_pipeline
test_pipeline[0].num_clips = 10
test_dataloader = dict(dataset=dict(data_root='data/coin', pipeline=test_pipeline))
train_dataloader = dict(dataset=dict(data_root='data/coin'))
val_dataloader = dict(dataset=dict(data_root='data/coin'))

# Published as 2e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=5, end=30,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
