_base_ = ['vssd-small_8xb128_in1k-224.py']

custom_hooks = [*_base_.custom_hooks, dict(type='vmamba_mm.MESAHook', value=1.5)]
