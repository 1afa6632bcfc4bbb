# Kinetics-400, clips of 8 frames at 224x224 from the whole video (sparse sampling), tested on
# 4 clips x 3 crops; 8 GPUs x 64 videos x 2 augmentations. docs/video.md says how the data lie.
#
# A leaf config with other frames, sizes or augmentation changes the pipelines in place, and gives
# them to the loaders again, since a config's lists are replaced as a whole:
#
#     for pipeline in (_base_.train_pipeline, _base_.val_pipeline, _base_.test_pipeline):
#         pipeline[0].num_frames = 16
#     del pipeline
#     _base_.augment[0].update(num_policies=2, magnitude_level=5, magnitude_std=0.25)
#     _base_.train_pipeline[1].transforms[0].transforms = _base_.augment
#     train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    '../schedules/video_adamw.py',
    '../vmamba_mm.py',
]

model = dict(
    type='vmamba_mm.VideoClassifier',
    # The leaf names the backbone, which takes (B, 3, T, H, W), and the head's in_channels.
    head=dict(
        type='mmpretrain.LinearClsHead', num_classes=400,
        loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[
        dict(type='mmpretrain.Mixup', alpha=0.8), dict(type='mmpretrain.CutMix', alpha=1.0)]))

data_preprocessor = dict(
    type='vmamba_mm.ClipPreprocessor',
    num_classes=400,  # Mixup and CutMix make labels for them
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
bgr_mean = data_preprocessor['mean'][::-1]
bgr_std = data_preprocessor['std'][::-1]

# Of every frame; the random numbers are the same for all frames of a clip.
augment = [
    # rand-m7-n4-mstd0.5-inc1, of the small and the middle models
    dict(type='vmamba_mm.RandAugment', policies='timm_increasing', num_policies=4, total_level=10,
         magnitude_level=7, magnitude_std=0.5,
         hparams=dict(pad_val=[round(x) for x in bgr_mean], interpolation='bicubic')),
    dict(type='vmamba_mm.RandomResizedCrop', scale=224),
    dict(type='vmamba_mm.RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='vmamba_mm.RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02,
         max_area_ratio=1 / 3, fill_color=bgr_mean, fill_std=bgr_std),
]
train_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=8, random=True),
    dict(type='vmamba_mm.RepeatClips', times=2, transforms=[
        dict(type='vmamba_mm.PerFrame', transforms=augment)]),
    dict(type='vmamba_mm.PackClips'),
]
val_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=8),
    dict(type='vmamba_mm.PerFrame', transforms=[
        dict(type='mmpretrain.ResizeEdge', scale=224, edge='short'),
        dict(type='mmpretrain.CenterCrop', crop_size=224)]),
    dict(type='vmamba_mm.PackClips'),
]
test_pipeline = [
    dict(type='vmamba_mm.LoadClips', num_frames=8, num_clips=4),
    dict(type='vmamba_mm.PerFrame', transforms=[
        dict(type='mmpretrain.ResizeEdge', scale=224, edge='short')]),
    dict(type='vmamba_mm.ThreeCrops', crop_size=224),
    dict(type='vmamba_mm.PackClips'),
]

dataset = dict(type='vmamba_mm.VideoDataset', data_root='data/kinetics400', data_prefix='videos')
train_dataloader = dict(
    batch_size=64, num_workers=12, drop_last=True, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='train.csv', pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=64, num_workers=12, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='val.csv', pipeline=val_pipeline, test_mode=True, **dataset))
test_dataloader = dict(
    batch_size=8, num_workers=12, persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='val.csv', pipeline=test_pipeline, test_mode=True, **dataset))
val_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

# Published numbers are those of the best epoch.
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=3, save_best='accuracy/top1', rule='greater'))
env_cfg = dict(cudnn_benchmark=True)
randomness = dict(seed=0, diff_rank_seed=True)
