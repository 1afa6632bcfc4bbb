# The published recipe of tiny on Breakfast, from Kinetics-400.
# A leaf config names frames, batch and weights; the lists are as those of Kinetics-400.
_base_ = ['./k400_tiny.py']

model = dict(head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)

test_dataloader = dict(dataset=dict(data_root='data/breakfast'))
train_dataloader = dict(dataset=dict(data_root='data/breakfast'))
val_dataloader = dict(dataset=dict(data_root='data/breakfast'))

# Published as 2e-4 for 256 samples, from and to 1e-6 before the factor for the batch.
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, by_epoch=True, begin=0, end=5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=5, end=70,
         convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=70)
