# The fine-tuning schedule of VideoMamba's video recipes (those of VideoMAE): AdamW, bf16, a cosine
# that steps every iteration after 5 epochs of warm-up. These are the values of the tiny model on
# Kinetics-400; a leaf config says its own epochs, rate and decay.
max_epochs = 70
warmup_epochs = 5

# Published as lr 2e-4 for 256 samples, times (8 GPUs x 64 videos x 2 augmentations) / 256.
optim_wrapper = dict(
    # A GPU is needed; on a CPU use type='OptimWrapper' (tools/train.py does so and says it).
    type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0,
    # Few groups and one kernel for each: the same update, without waiting for Python.
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=8e-4, betas=(0.9, 0.999), weight_decay=0.1, fused=True),
    # The published rule: no decay of 1-D parameters, of biases, and of these.
    paramwise_cfg=dict(
        norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.,
        custom_keys={'pos_embed': dict(decay_mult=0.), 'cls_token': dict(decay_mult=0.)}))
# Of the videos, as mmengine counts: the two augmentations of each are in the rate.
auto_scale_lr = dict(base_batch_size=512)

# 1e-6 -> 2e-4 -> 1e-6, before the factor for the batch
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, by_epoch=True, begin=0, end=warmup_epochs,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=5e-3, by_epoch=True, begin=warmup_epochs,
         end=max_epochs, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
