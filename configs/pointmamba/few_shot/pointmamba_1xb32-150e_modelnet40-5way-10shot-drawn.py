# The same on tasks that are drawn from ModelNet40 as the public ones were: other classes and clouds
# than these, the same each time.
_base_ = ['./pointmamba_1xb32-150e_modelnet40-5way-10shot.py']

task = dict(data_root='data/modelnet40_normal_resampled', draw=True)
train_dataloader = dict(dataset=task)
val_dataloader = dict(dataset=task)
test_dataloader = val_dataloader
