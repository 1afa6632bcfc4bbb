# The early version on ScanObjectNN PB_T50_RS, from random weights.
_base_ = ['_base_/scanobjectnn.py']

model = dict(
    data_preprocessor=dict(augments=[dict(type='scale_shift', scale=(2 / 3, 3 / 2), shift=0.2)]),
    backbone=dict(arch='axes_g128', drop_path_rate=0.1))

scan = dict(variant='pb_t50_rs')
train_dataloader = dict(dataset=scan)
val_dataloader = dict(dataset=scan)
test_dataloader = val_dataloader
