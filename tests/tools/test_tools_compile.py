"""torch.compile in a training of each task, by mmengine's ``compile`` and by the backbone's."""

import re

import pytest

SCANS = 4  # of the tiny backbone: one in each block
TASKS = {
    'cls': '''
train_cfg = dict(max_epochs=1)
param_scheduler = dict(_delete_=True, type='ConstantLR')''',
    # UperNet, and crops of one size
    'seg': """
model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    decode_head=dict(_delete_=True, type='UPerHead', in_channels=[8, 16, 32, 64],
                     in_index=[0, 1, 2, 3], pool_scales=(1, 2), channels=8, num_classes=150,
                     norm_cfg=dict(type='BN'), align_corners=False,
                     loss_decode=dict(type='CrossEntropyLoss')))
train_cfg = dict(max_iters=2, val_interval=2)
param_scheduler = dict(_delete_=True, type='ConstantLR', by_epoch=False)""",
    'det': """
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomChoiceResize', keep_ratio=False,
         scales=[(64, 64), (96, 64), (64, 128), (128, 160), (160, 96)]),
    dict(type='PackDetInputs')]
train_dataloader = dict(batch_size={batch}, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs={epochs})
randomness = dict(seed=0)"""}


@pytest.fixture
def train(projects, call, tmp_path):
    """train(task, more text of the config) -> scans of each graph of which it has any."""
    def train(task, text):
        base, _, _ = projects(task)
        config = tmp_path / 'compiled.py'
        config.write_text(f"_base_ = [{str(base)!r}]\ncustom_imports = dict(imports=['counting'])"
                          f'\n{text}\n')
        code, out, err = call('train.py', config, '--work-dir', tmp_path / 'w')
        assert code == 0, err
        assert dict(cls='accuracy/top1', seg='mIoU', det='segm_mAP')[task] in out  # evaluated
        return [int(n) for n in re.findall('^graph with ([1-9][0-9]*) scans', out, re.M)]

    return train


@pytest.mark.parametrize('task', TASKS)
def test_mmengine_compiles_the_training_step(task, train):
    """The heads have graph breaks, the backbone none."""
    text = TASKS[task].replace('{batch}', '4').replace('{epochs}', '1')
    scans = train(task, text + "\ncompile = dict(backend='counting')")
    assert set(scans) == {SCANS} and 1 <= len(scans) <= 2


def test_backbone_alone_in_detection(train):
    """Sixteen steps on images of several sizes, and the evaluation."""
    text = TASKS['det'].replace('{batch}', '1').replace('{epochs}', '4')
    scans = train('det', text + "\nmodel = dict(backbone=dict(compile=dict(backend='counting')))")
    assert set(scans) == {SCANS} and 2 <= len(scans) <= 4
