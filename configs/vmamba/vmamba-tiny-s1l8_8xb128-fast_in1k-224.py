# The recipe of vmamba-tiny-s1l8_8xb128_in1k-224 on training transforms that take half of the CPU
# time: the same steps, settings and random draws. The crop is resized by torch, within a grey level
# of Pillow (backend='pillow' gives its bits), and the noise of the erasing is drawn by torch.
# Normalisation, Mixup and CutMix are on the GPU in the stock recipe already.
_base_ = ['vmamba-tiny-s1l8_8xb128_in1k-224.py']

train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(
        type='vmamba_mm.RandomResizedCrop', scale=224, backend='torch',
        interpolation='bicubic'),
    dict(type='vmamba_mm.RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='vmamba_mm.RandAugment', policies='timm_increasing', num_policies=2,
        total_level=10, magnitude_level=9, magnitude_std=0.5,
        hparams=dict(
            pad_val=[round(x) for x in _base_.bgr_mean], interpolation='bicubic')),
    dict(
        type='vmamba_mm.RandomErasing', erase_prob=0.25, mode='rand',
        min_area_ratio=0.02, max_area_ratio=1 / 3, fill_color=_base_.bgr_mean,
        fill_std=_base_.bgr_std),
    dict(type='vmamba_mm.PackInputs'),
]))
