_base_ = ['_base_/imagenet_224.py']

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    head=dict(in_channels=768))

# 5e-4 for 512 images.
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
auto_scale_lr = dict(base_batch_size=512)

# 0.9996 for 4096 images: its eighth root. Statistics of batch norms are averaged too.
custom_hooks = [
    dict(type='EMAHook', momentum=5e-5, update_buffers=True, priority='ABOVE_NORMAL'),
    dict(type='vmamba_mm.MESAHook', value=2.0)]
