_base_ = ['../_base_/tasks/cascade-mask-rcnn_lsj-100ep_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='vmamba_mm.Vim',
        # The published run also had rope='both', as its ImageNet model, which is not released, had.
        arch=dict(base='tiny', image_size=1024, cls_token='none'),
        features='stream',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vim/tiny.in1k', prefix='backbone.')),
    neck=dict(in_channels=192))

# The published rule: all but pos_embed is decayed, norms and biases too.
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay_rate=0.837, custom_keys={'pos_embed': dict(decay_mult=0.)}))
