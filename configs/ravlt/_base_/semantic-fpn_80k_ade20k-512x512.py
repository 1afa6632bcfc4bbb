_base_ = ['../../_base_/tasks/semantic-fpn_80k_ade20k-512x512.py']

model = dict(
    # The leaf names arch, drop_path_rate, init_cfg and the channels of the maps.
    backbone=dict(_delete_=True, type='vmamba_mm.RAVLT'))

param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-6, by_epoch=False, begin=0, end=80000)]
sync_bn = 'torch'
