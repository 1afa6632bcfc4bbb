# ImageNet-1K at 224x224, 8 GPUs: VMamba's recipe with MESA, 1e-3 for 1024 images.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate, the head's in_channels, and the weight of MESA.
    backbone=dict(_delete_=True, type='vmamba_mm.MILA', out_indices=(3, )))

# The published accuracies were measured in fp32.
val_cfg = dict(fp16=False)
test_cfg = dict(fp16=False)
