# AID: 30 classes, 5000 images to train on and 5000 to measure, which are the same that the
# best epoch is chosen by. The order of the classes is the authors', so that their weights fit.
_base_ = ['./rsmamba_224.py']

classes = [
    'Port', 'Square', 'River', 'Pond', 'Playground', 'Mountain', 'Park', 'Airport',
    'SparseResidential', 'Stadium', 'Industrial', 'Church', 'DenseResidential', 'Parking',
    'Farmland', 'Desert', 'Viaduct', 'Forest', 'StorageTanks', 'Center', 'Meadow',
    'MediumResidential', 'School', 'BareLand', 'Commercial', 'BaseballField', 'RailwayStation',
    'Resort', 'Bridge', 'Beach']
data_preprocessor = dict(
    num_classes=30,
    mean=[101.02608706, 103.9996994, 93.50157708],
    std=[40.36728927, 37.11132278, 35.90649976],
    to_rgb=True)
model = dict(head=dict(num_classes=30))

train_dataloader = dict(dataset=dict(data_root='data/aid/', classes=classes))
val_dataloader = dict(dataset=dict(data_root='data/aid/', classes=classes))
test_dataloader = val_dataloader
