# Mask R-CNN with the adapter, 12 epochs, 8 GPUs x 2 images, in fp32: the values of small, base and
# large.
_base_ = ['../../_base_/tasks/mask-rcnn_fpn_1x_coco.py']

model = dict(
    # The leaf names arch and drop_path_rate, and the neck's in_channels.
    backbone=dict(_delete_=True, type='vmamba_mm.VisionRWKVAdapter', features='last'))

# The published adapters have batch norms of all GPUs.
sync_bn = 'torch'

optim_wrapper = dict(
    constructor='vmamba_mm.LayerDecayOptimWrapperConstructor',
    # The published rule: what has one dimension and biases have no decay.
    paramwise_cfg=dict(
        _delete_=True, layer_decay_rate=0.85, norm_decay_mult=0., bias_decay_mult=0.,
        flat_decay_mult=0.))
