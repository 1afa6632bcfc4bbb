# UperNet with the adapter, 160k iterations, 8 GPUs x 2 images, in fp16; tested by sliding windows.
_base_ = ['../../_base_/tasks/upernet_160k_ade20k-512x512.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the in_channels of the heads.
    backbone=dict(_delete_=True, type='vmamba_mm.VisionRWKVAdapter', features='each'),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))

# The published adapters have batch norms of all GPUs.
sync_bn = 'torch'

optim_wrapper = dict(
    type='AmpOptimWrapper', loss_scale=dict(init_scale=512.),
    constructor='vmamba_mm.LayerDecayOptimWrapperConstructor',
    # The published rule: what has one dimension and biases have no decay.
    paramwise_cfg=dict(
        _delete_=True, layer_decay_rate=0.9, norm_decay_mult=0., bias_decay_mult=0.,
        flat_decay_mult=0.))
