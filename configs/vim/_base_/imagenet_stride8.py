# 30 epochs from the model of 16 pixels from patch to patch, whose patches then overlap by half: the
# rate is constant and there is hardly any decay. 8 GPUs x 128 images.
_base_ = ['./imagenet_224.py']

train_dataloader = dict(batch_size=128)
# Published as 5e-6 for 512 images, of which the warm-up and the minimum have twice as much.
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8))
param_scheduler = [dict(type='ConstantLR', factor=1.0, by_epoch=True, begin=0, end=30)]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=1024)
