_base_ = ['_base_/upernet_adapter_160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        arch=dict(base='tiny', layer_scale=1.0),
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://vision_rwkv/tiny', prefix='backbone.')),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192))

optim_wrapper = dict(optimizer=dict(lr=12e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
