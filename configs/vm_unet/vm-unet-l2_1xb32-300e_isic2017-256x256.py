_base_ = ['_base_/isic_256.py']

train_dataloader = dict(dataset=dict(data_root='data/isic2017/'))
val_dataloader = dict(dataset=dict(data_root='data/isic2017/'))
test_dataloader = val_dataloader
