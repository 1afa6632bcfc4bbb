_base_ = ['_base_/change.py']

data = dict(data_root='data/LEVIR-CD')
train_dataloader = dict(dataset=dict(dataset=data))
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
