_base_ = ['efficientvim-m2_8xb256-300e_in1k-224.py']

# 450 epochs and 10 at the lowest rate, with MESA from epoch 112 on.
train_cfg = dict(max_epochs=460)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=450)]
custom_hooks = [_base_.custom_hooks[0], dict(_base_.custom_hooks[1], begin=111.5 / 460)]
