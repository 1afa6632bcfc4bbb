_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.6),
    head=dict(in_channels=768))

# Published as 3e-4 for 512 images: 1e-6 -> 6e-4 -> 6e-6.
optim_wrapper = dict(optimizer=dict(lr=6e-4))
param_scheduler = [dict(_base_.param_scheduler[0], start_factor=1 / 600), _base_.param_scheduler[1]]
