# ImageNet-1K at 224x224, 8 GPUs x 128 images: the published recipe of all nine VMambas.
# The Swin bases of mmpretrain already hold the timm-style augmentation (bicubic crop, flip,
# rand-m9-mstd0.5-inc1, pixel erasing 0.25), Mixup 0.8 / CutMix 1.0 and label smoothing 0.1.
# Colour jitter 0.4 is listed with the release but timm leaves it out beside RandAugment.
_base_ = [
    'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../schedules/imagenet_300e_adamw.py',
    'mmpretrain::_base_/default_runtime.py',
    '../vmamba_mm.py',
]

# No collate_fn: tools, mmpretrain's and ours, add default_collate, and mmengine breaks one that
# comes through `_base_ = 'vmamba_mm::...'` (it passes it a `_scope_`).
train_dataloader = dict(batch_size=128, num_workers=8, drop_last=True, persistent_workers=True)
val_dataloader = dict(batch_size=128, num_workers=8, persistent_workers=True)
test_dataloader = val_dataloader

# EMA 0.9999 from the first step on. Published numbers are the best epoch of raw and EMA
# weights on the validation set; mmengine validates and saves the EMA weights.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=3, save_best='accuracy/top1', rule='greater'))

env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=0, diff_rank_seed=True)
