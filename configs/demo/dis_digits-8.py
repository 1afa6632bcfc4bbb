# `make demo-diffusion`: a small DiS on grey digits of 8x8 pixels, with classes. The loss, the
# optimizer and the averages are those of the published recipe; what differs is the size of things,
# and what makes minutes enough.
_base_ = ['../_base_/tasks/diffusion.py']

data_preprocessor = dict(mean=[127.5], std=[127.5], to_rgb=False)
model = dict(
    backbone=dict(type='vmamba_mm.DiS', arch=dict(
        base='small_p4', embed_dims=128, depth=2, image_size=8, in_channels=1, num_classes=10,
        d_state=4, expand=1)),
    # Half as much noise: in the later half of the published times nothing is left of an image of 64
    # pixels, and half of the training would teach nothing.
    diffusion=dict(beta_end=0.01),
    data_preprocessor=data_preprocessor,
    test_cfg=dict(num_steps=50, guided_channels=None))

train_dataloader = dict(
    batch_size=64, num_workers=1, persistent_workers=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmpretrain.CustomDataset', data_root='data/demo/digits', data_prefix='train',
        # A digit that is mirrored is none.
        pipeline=[dict(type='LoadImageFromFile', color_type='grayscale'),
                  dict(type='mmpretrain.PackInputs')]))
# The demo makes its samples by diffusers, and measures them itself.
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None

epochs = 65
train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    # The steps of a scan begin small, as of long sequences: through them the patches learn of their
    # class. A thousand iterations would hardly change them at the rate of the others.
    paramwise_cfg=dict(custom_keys={
        'dt_proj': dict(lr_mult=10.0), 'label_emb': dict(lr_mult=5.0)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=3,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.02, by_epoch=True, begin=3, end=epochs,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=0.01, priority='ABOVE_NORMAL')]
default_hooks = dict(
    logger=dict(interval=105), checkpoint=dict(interval=epochs, max_keep_ckpts=1))
