# Colour noise of a standard deviation of 50, of 255: patches of 128x128 pixels of DFWB (DIV2K,
# Flickr2K, BSD500, WED); validation on CBSD68, with the noise of the published numbers.
_base_ = ['../../_base_/tasks/restoration.py']

sigma = 50
train_pipeline = [
    dict(type='vmamba_mm.LoadPair'),
    dict(type='vmamba_mm.PatchOfPair', size=128),
    dict(type='vmamba_mm.TurnPair'),
    dict(type='vmamba_mm.AddNoise', sigma=sigma),
    dict(type='vmamba_mm.PackPair'),
]
test_pipeline = [
    dict(type='vmamba_mm.LoadPair'),
    dict(type='vmamba_mm.AddNoise', sigma=sigma, seed=0),
    dict(type='vmamba_mm.PackPair'),
]
model = dict(loss='charbonnier')
train_dataloader = dict(batch_size=2, dataset=dict(
    gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR', 'BSD500', 'WED'], pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(gt='CBSD68', pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(gt='CBSD68', pipeline=test_pipeline))
val_evaluator = dict(type='vmamba_mm.RestorationMetric')
test_evaluator = val_evaluator
