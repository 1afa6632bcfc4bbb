# `make demo-diffusion`: a small DiS on grey digits of 12x12 pixels, with classes. The loss, the
# optimizer and the averages are those of the published recipe; what differs is the size of things.
_base_ = ['../_base_/tasks/diffusion.py']

data_preprocessor = dict(mean=[127.5], std=[127.5], to_rgb=False)
model = dict(
    backbone=dict(type='vmamba_mm.DiS', arch=dict(
        base='small_p2', embed_dims=96, depth=4, patch_size=3, image_size=12, in_channels=1,
        num_classes=10, d_state=2, expand=1)),
    data_preprocessor=data_preprocessor,
    test_cfg=dict(num_steps=50, guided_channels=None))

train_dataloader = dict(
    batch_size=32, num_workers=1, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/demo/digits', data_prefix='train',
        # A digit that is mirrored is none.
        pipeline=[dict(type='LoadImageFromFile', color_type='grayscale'),
                  dict(type='mmpretrain.PackInputs')]))
# The demo makes its samples by diffusers, and measures them itself.
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None

epochs = 12
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=3e-5, by_epoch=True, begin=1, end=epochs,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=0.01, priority='ABOVE_NORMAL')]
default_hooks = dict(
    logger=dict(interval=25), checkpoint=dict(interval=epochs, max_keep_ckpts=1))
