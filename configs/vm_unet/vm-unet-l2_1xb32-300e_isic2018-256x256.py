_base_ = ['_base_/isic_256.py']

train_dataloader = dict(dataset=dict(data_root='data/isic2018/'))
val_dataloader = dict(dataset=dict(data_root='data/isic2018/'))
test_dataloader = val_dataloader
