# What `make demo-video` compares with: the same model, trained in the same way on the same clips,
# of which it sees one frame each.
_base_ = ['videomamba_moving-digits-32.py']

model = dict(backbone=dict(arch=dict(num_frames=1)))
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[0].num_frames = 1
test_pipeline[0].num_frames = 1
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
