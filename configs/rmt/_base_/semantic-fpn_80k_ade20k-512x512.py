_base_ = ['../../_base_/tasks/semantic-fpn_80k_ade20k-512x512.py']

model = dict(
    # The leaf names arch, drop_path_rate and init_cfg.
    backbone=dict(_delete_=True, type='vmamba_mm.RMT'),
    neck=dict(in_channels=[64, 128, 256, 512]))
sync_bn = 'torch'
