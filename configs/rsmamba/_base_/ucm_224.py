# UC Merced: 21 classes, 1470 images to train on and 630 to measure, which are the same that the
# best epoch is chosen by. The order of the classes is the authors', so that their weights fit.
_base_ = ['./rsmamba_224.py']

classes = [
    'harbor', 'parkinglot', 'buildings', 'mediumresidential', 'sparseresidential', 'forest',
    'agricultural', 'overpass', 'golfcourse', 'freeway', 'baseballdiamond', 'beach',
    'intersection', 'runway', 'mobilehomepark', 'chaparral', 'airplane', 'river',
    'storagetanks', 'tenniscourt', 'denseresidential']
data_preprocessor = dict(
    num_classes=21,
    mean=[123.770241, 125.41281689, 115.35737613],
    std=[44.17314347, 41.63589266, 39.5737929],
    to_rgb=True)
model = dict(head=dict(num_classes=21))

train_dataloader = dict(dataset=dict(data_root='data/ucmerced/', classes=classes))
val_dataloader = dict(dataset=dict(data_root='data/ucmerced/', classes=classes))
test_dataloader = val_dataloader
