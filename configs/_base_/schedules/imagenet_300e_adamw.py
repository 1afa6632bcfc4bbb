# 300 epochs, total batch 1024. What differs from the Swin schedule of mmpretrain: mixed
# precision, clipping, a cosine that steps every iteration, and no custom no-decay keys.
_base_ = ['mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py']

optim_wrapper = dict(
    # fp16 autocast with a dynamic loss scale, as published. A GPU is needed; on a CPU use
    # type='OptimWrapper' (tools/train.py does so by itself and says it).
    type='AmpOptimWrapper',
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(fused=True),
    clip_grad=dict(max_norm=5.0),
    # The published rule: every 1-D parameter (norms, Ds) and every '.bias' has no decay.
    # A_logs, dt_projs_weight, dt_projs_bias and x_proj_weight have two or more dimensions
    # and ARE decayed: the "no weight decay" marks in the released model code were never read.
    paramwise_cfg=dict(
        _delete_=True, norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.))

param_scheduler = [
    # 1e-6 -> 1e-3
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20,
        convert_to_iter_based=True),
    # 1e-3 -> 1e-5; a ratio, because the published minimum scales with the batch like the rest
    dict(
        type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=20, end=300,
        convert_to_iter_based=True),
]

# The published accuracies were also measured under autocast.
val_cfg = dict(fp16=True)
test_cfg = dict(fp16=True)
