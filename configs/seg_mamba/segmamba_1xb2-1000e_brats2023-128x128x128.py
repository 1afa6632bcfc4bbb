# SegMamba on BraTS 2023, 1000 epochs of 250 batches of 2 patches.
_base_ = ['../_base_/tasks/volume_brats.py']

model = dict(
    backbone=dict(type='vmamba_mm.SegMambaEncoder', arch='base', in_channels=4),
    decode_head=dict(
        type='vmamba_mm.ResidualDecoder', in_channels=[48, 96, 192, 384], image_channels=4,
        num_classes=4, hidden_dims=768))
