# ImageNet-1K at 224x224, 8 GPUs x 128 images: VMamba's recipe, 1e-3 for 1024 images; small and base
# have another rate.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the head's in_channels.
    backbone=dict(_delete_=True, type='vmamba_mm.VSSD', out_indices=(3, )))

# The published averages are of the statistics of batch norms too (timm's ModelEma).
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]
