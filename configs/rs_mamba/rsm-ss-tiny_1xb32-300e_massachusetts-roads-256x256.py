_base_ = ['_base_/segmentation.py']

data = dict(data_root='data/Massachusetts-roads', metainfo=dict(
    classes=('background', 'road'), palette=[[0, 0, 0], [255, 255, 255]]))
train_dataloader = dict(dataset=dict(dataset=data))
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
