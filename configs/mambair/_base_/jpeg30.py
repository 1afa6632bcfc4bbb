# Artefacts of JPEG of the quality 30 in grey images: patches of 126x126 pixels of DFWB; validation
# on Classic5.
_base_ = ['../../_base_/tasks/restoration.py']

quality = 30
load = dict(type='vmamba_mm.LoadPair', colour='grey')
train_pipeline = [
    load,
    # Before the patch is cut and turned, so that JPEG's squares of 8x8 pixels begin anywhere in it.
    dict(type='vmamba_mm.CompressJPEG', quality=quality),
    dict(type='vmamba_mm.PatchOfPair', size=126),
    dict(type='vmamba_mm.TurnPair'),
    dict(type='vmamba_mm.PackPair'),
]
test_pipeline = [
    load,
    dict(type='vmamba_mm.CompressJPEG', quality=quality),
    dict(type='vmamba_mm.PackPair'),
]
model = dict(loss='charbonnier')
train_dataloader = dict(batch_size=2, dataset=dict(
    gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR', 'BSD500', 'WED'], pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(gt='Classic5', pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(gt='Classic5', pipeline=test_pipeline))
val_evaluator = dict(type='vmamba_mm.RestorationMetric')
test_evaluator = val_evaluator
randomness = dict(seed=42)
