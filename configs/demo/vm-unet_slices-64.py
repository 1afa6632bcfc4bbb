# `make demo-medical`: a small VM-UNet on the axial slices of made-up heads. The recipe is that of
# Synapse; the model starts from random weights.
_base_ = ['../vm_unet/vm-unet-l2_1xb32-300e_synapse-224x224.py']

size = (64, 64)
classes = dict(classes=('background', 'ventricles', 'tumour'),
               palette=[[0, 0, 0], [0, 130, 200], [230, 25, 75]])
model = dict(
    data_preprocessor=dict(size=size),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=24, depths=(1, 1, 2, 1), decoder_depths=(1, 1, 1, 1),
                  d_state=4),
        drop_path_rate=0.0,
        # The published initialisation is for 96 channels and more, and for weights to start from.
        # With 24 its gates are nearly closed, and all was called background after 240 steps.
        init_cfg=dict(_delete_=True, type='Xavier', layer='Linear', distribution='uniform')),
    # Ventricles and tumours are 1 % of the voxels.
    decode_head=dict(
        in_channels=6, channels=6, num_classes=3,
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_weight=1.0, class_weight=[0.1, 1.0, 1.0]),
            dict(type='vmamba_mm.DiceLoss', per_image=False, squared=True, smooth=1e-5)]))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
slices = dict(_delete_=True, type='BaseSegDataset', data_root='data/demo/heads/slices',
              metainfo=classes, img_suffix='.png', seg_map_suffix='.png')
train_dataloader = dict(batch_size=16, num_workers=1, dataset=dict(
    data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
    pipeline=train_pipeline, **slices))
val_dataloader = dict(batch_size=16, num_workers=1, dataset=dict(
    data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
    pipeline=test_pipeline, **slices))
test_dataloader = val_dataloader

max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=1,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=1, end=max_epochs,
         convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_best=None))
