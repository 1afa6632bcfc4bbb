# NWPU-RESISC45: 45 classes, 22005 images to train on and 9495 to measure, which are the same that
# the best epoch is chosen by. The order of the classes is the authors', so that their weights fit.
_base_ = ['./rsmamba_224.py']

classes = [
    'river', 'terrace', 'snowberg', 'stadium', 'parking_lot', 'thermal_power_station',
    'rectangular_farmland', 'cloud', 'intersection', 'meadow', 'palace', 'ground_track_field',
    'commercial_area', 'beach', 'church', 'baseball_diamond', 'ship', 'industrial_area',
    'bridge', 'freeway', 'medium_residential', 'circular_farmland', 'mobile_home_park',
    'railway', 'forest', 'sparse_residential', 'harbor', 'wetland', 'mountain', 'airport',
    'golf_course', 'overpass', 'dense_residential', 'chaparral', 'basketball_court',
    'airplane', 'tennis_court', 'runway', 'storage_tank', 'island', 'railway_station', 'lake',
    'sea_ice', 'desert', 'roundabout']
data_preprocessor = dict(
    num_classes=45,
    mean=[93.847266, 97.20128819, 87.66547902],
    std=[37.10216765, 34.61650149, 33.70191772],
    to_rgb=True)
model = dict(head=dict(num_classes=45))

train_dataloader = dict(dataset=dict(data_root='data/resisc45/', classes=classes))
val_dataloader = dict(dataset=dict(data_root='data/resisc45/', classes=classes))
test_dataloader = val_dataloader
