# `make demo-vlm`: a small Cobra on captions of digits on photographs. tools/demo/vlm.py trains the
# two towers first; projector and language model, which reads and writes bytes, start at random,
# with a rate that suits them.
_base_ = ['../cobra/_base_/conversations.py']

root = 'data/demo/captions'
model = dict(
    towers=[
        dict(name='xcit_nano_12_p8_224', image_size=64, patch_size=8, embed_dim=64, depth=5,
             num_heads=2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
             init_cfg=dict(type='Pretrained',
                           checkpoint='work_dirs/demo-vlm-towers/tower0.pth')),
        dict(name='vit_tiny_patch16_224', image_size=64, patch_size=8, embed_dim=32, depth=3,
             num_heads=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), reg_tokens=4,
             init_cfg=dict(type='Pretrained',
                           checkpoint='work_dirs/demo-vlm-towers/tower1.pth'))],
    language_model=dict(_delete_=True, mixer='mamba', vocab_size=257, embed_dims=96, depth=3),
    tokenizer='byte', generation=dict(max_new_tokens=60))

load = [dict(type='vmamba_mm.LoadPicture'),
        dict(type='vmamba_mm.SquarePicture', size=64),
        dict(type='vmamba_mm.PackConversation')]
train_dataloader = dict(
    batch_size=32, num_workers=1,
    dataset=dict(data_root=root, ann_file='train.json', pipeline=load))
test_dataloader = dict(
    batch_size=50, num_workers=1,
    dataset=dict(data_root=root, ann_file='val.json', pipeline=load))
test_evaluator = dict(words=[
    'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'])

max_epochs = 5
optim_wrapper = dict(_delete_=True, type='OptimWrapper',
                     constructor='vmamba_mm.GroupedOptimWrapperConstructor',
                     optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05),
                     paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.,
                                        flat_decay_mult=0.),
                     clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, begin=0, end=0.3,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0.3, end=max_epochs,
         convert_to_iter_based=True)]
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(logger=dict(interval=25),
                     checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
