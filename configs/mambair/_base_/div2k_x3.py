# Super-resolution x3 of DIV2K, patches of 192x192 pixels of the large images; validation on Set5.
_base_ = ['../../_base_/tasks/restoration.py']

scale = 3
load = dict(type='vmamba_mm.LoadPair', scale=scale)
train_pipeline = [
    load,
    dict(type='vmamba_mm.PatchOfPair', size=192, scale=scale),
    dict(type='vmamba_mm.TurnPair'),
    dict(type='vmamba_mm.PackPair'),
]
test_pipeline = [load, dict(type='vmamba_mm.PackPair')]
set5 = dict(gt='Set5/HR', lq='Set5/LR_bicubic/X3', lq_name='{}x3', pipeline=test_pipeline)
train_dataloader = dict(dataset=dict(
    gt=['DIV2K/DIV2K_train_HR'], lq=['DIV2K/DIV2K_train_LR_bicubic/X3'], lq_name='{}x3',
    pipeline=train_pipeline))
val_dataloader = dict(dataset=set5)
test_dataloader = dict(dataset=set5)
val_evaluator = dict(type='vmamba_mm.RestorationMetric', crop_border=scale, on_luma=True)
test_evaluator = val_evaluator
