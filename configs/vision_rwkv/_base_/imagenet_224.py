# ImageNet-1K at 224x224: VMamba's recipe, 1e-3 for 1024 images and 300 epochs, in fp32 and without
# averaged weights.
_base_ = ['../../_base_/tasks/imagenet_224.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the head's in_channels.
    backbone=dict(_delete_=True, type='vmamba_mm.VisionRWKV'))

optim_wrapper = dict(
    # Published runs had no mixed precision.
    type='OptimWrapper',
    # The published rule: norms and biases have no decay; decays, bonuses, mixtures, layer scales
    # and position embeddings ARE decayed.
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0., bias_decay_mult=0.))

custom_hooks = []

val_cfg = dict(fp16=False)
test_cfg = dict(fp16=False)
