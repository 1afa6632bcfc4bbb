_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(
        arch='tiny'),
    head=dict(in_channels=192))

train_dataloader = dict(batch_size=128)
# Published as 5e-4 for 512 images.
optim_wrapper = dict(optimizer=dict(weight_decay=0.1))
auto_scale_lr = dict(base_batch_size=1024)
