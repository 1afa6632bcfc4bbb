# Conversations about images, in the files of LLaVA, as Cobra was trained: 8 GPUs with 16 each, the
# answers alone in the loss.
#
#     data/llava-lvis4v-lrv/conversations.json, and images where it names them
#     data/gpt-neox-20b/tokenizer.json
#
# The authors put LLaVA-v1.5-mix665k, LVIS-Instruct-4V and LRV-Instruct together: ann_file may be a
# list of files.
_base_ = ['../../_base_/vmamba_mm.py']

default_scope = 'mmengine'
root = 'data/llava-lvis4v-lrv'

model = dict(
    type='vmamba_mm.Cobra',
    towers=[
        dict(name='vit_large_patch14_reg4_dinov2.lvd142m', image_size=384, pretrained=True,
             mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        dict(name='vit_so400m_patch14_siglip_384', image_size=384, pretrained=True,
             mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))],
    language_model=dict(
        arch='mamba-2.8b', with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='vmamba_mm://mamba_lm/mamba-2.8b.zephyr')),
    tokenizer='data/gpt-neox-20b/tokenizer.json', projector='fused-gelu-mlp')

load = [dict(type='vmamba_mm.LoadPicture'),
        dict(type='vmamba_mm.SquarePicture', size=384, way='resize'),
        dict(type='vmamba_mm.PackConversation')]
collate = dict(type='pseudo_collate')
train_dataloader = dict(
    batch_size=16, num_workers=8, persistent_workers=True, drop_last=True, collate_fn=collate,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='vmamba_mm.Conversations', data_root=root, ann_file='conversations.json',
                 pipeline=load))
# What is answered in a test: the last question of each conversation.
test_dataloader = dict(
    batch_size=16, num_workers=4, collate_fn=collate,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='vmamba_mm.Conversations', data_root=root, ann_file='test.json',
                 pipeline=load, test_mode=True))
test_evaluator = dict(type='vmamba_mm.AnswerAccuracy')
test_cfg = dict()

# Of parameters with one dimension and biases none decays; A_log has two, and does. The rate rises
# in 3 % of the steps and falls with a cosine to 0.
optim_wrapper = dict(
    type='AmpOptimWrapper', dtype='bfloat16',
    constructor='vmamba_mm.GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-5, weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.),
    clip_grad=dict(max_norm=1.0))
max_epochs, warmup = 2, 0.06  # epochs
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=warmup,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0., by_epoch=True, begin=warmup, end=max_epochs,
         convert_to_iter_based=True)]
train_cfg = dict(by_epoch=True, max_epochs=max_epochs)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'))
randomness = dict(seed=7)
auto_scale_lr = dict(base_batch_size=128)
