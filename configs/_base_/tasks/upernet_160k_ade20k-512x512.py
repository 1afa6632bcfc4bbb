# UperNet on ADE20K at 512x512, 8 GPUs x 2 images, 160k iterations: Swin-T's stock recipe
# (AdamW 6e-5, weight decay 0.01, fp32, no clipping), as the published models used it. The
# published files are named 4xb4: the same total batch of 16.
_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    '../schedules/dense_decay.py',
    '../vmamba_mm.py',
]

optim_wrapper = dict(
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(fused=True),
    paramwise_cfg=dict(_delete_=True, custom_keys=_base_.dense_decay_keys))

# Published numbers are those of the best validation (128k, 144k or 160k iterations).
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='mIoU', rule='greater'))

# Multi-scale + flip: tta_model and tta_pipeline come with the stock bases (0.5 to 1.75 and
# flip). The factors scale the ORIGINAL image there, not the (2048, 512) of the single-scale
# test; the published multi-scale numbers were measured this way, so it stays.

checkpoint_file = None  # was the address of Swin's weights; nothing reads it
