"""The analyses on other numbers of channels, on models that change their config, on new configs."""

import json
import re

import numpy as np
import pytest
import tiny
from test_predict_images import bands_config, make_checkpoint
from test_tools_errors import assert_one_line

from vmamba_mm.mm import cli

# In mmengine's new style: Python imports, classes as types, no scope.
NEW_STYLE = """
from mmcv.transforms import LoadImageFromFile, Resize
from mmengine.dataset import DefaultSampler
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead

from vmamba_mm.models import VMamba

default_scope = None
model = dict(
    type=ImageClassifier, backbone=dict(type=VMamba, out_indices=(3,), arch=dict(
        embed_dims=8, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
        conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
        scan='cross')),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=2, in_channels=64, topk=(1,)))
data_preprocessor = dict(num_classes=2, mean=[120, 120, 120], std=[60, 60, 60], to_rgb=True)
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=CustomDataset, data_root={root!r}, data_prefix='val', pipeline=[
        dict(type=LoadImageFromFile), dict(type=Resize, scale=(32, 32)), dict(type=PackInputs)]))
test_evaluator = dict(type=Accuracy, topk=(1,))
test_cfg = dict()
"""


def test_analyses_of_six_channels(projects, call, tmp_path):
    projects('cls')  # the packages are ready
    config = bands_config(tmp_path, 6, 'own')
    checkpoint = make_checkpoint(config, tmp_path / 'model.pth')
    images = tmp_path / 'data/val'
    code, out, err = call('analysis/get_flops.py', config, '--shape', 32, 32, '--out-dir', 'flops')
    assert code == 0, err
    assert (tmp_path / 'flops/config.json').is_file()
    code, out, err = call('analysis/erf.py', config, '--checkpoint', checkpoint, '--images',
                          images, '--num-images', 1, '--size', 64, '--device', 'cpu')
    assert code == 0, err
    code, out, err = call('analysis/activation_maps.py', config, '--checkpoint', checkpoint,
                          images / 'red', '--size', 32, '--pixel', 3, '0.5')
    assert code == 0, err
    report = json.loads((tmp_path / 'work_dirs/activation_maps/activation_maps.json').read_text())
    assert report['images']['0']['position'] == [3.5 / 32, 0.5]
    code, out, err = call('analysis/resolution.py', config, '--checkpoint', checkpoint,
                          '--resolutions', 32, '--batch-size', 2)
    assert code == 0 and 'top-1' in out, err
    # A photograph has not the channels.
    photo = tmp_path / 'photo.tif'
    tiny.write_image(photo, (9, 9, 9), np.random.default_rng(0))
    assert_one_line(call('analysis/erf.py', config, '--images', photo, '--size', 64), photo,
                    '3 channel(s)', 'takes 6')


def test_flops_by_channels(mm, tmp_path, load_tool):
    """Of the stem's first convolution, 3x3 of stride 2 to 4 channels; of a backbone that tells
    its channels by its first convolution alone; of one whose first step packs pixels."""
    get_flops = load_tool('analysis/get_flops.py')
    path = tmp_path / 'config.py'
    path.write_text(tiny.cls_config(tmp_path))
    three, six, one = (get_flops.count_config(str(path), [f'model.backbone.in_channels={n}'],
                                              (32, 32)).flops for n in (3, 6, 1))
    assert six - three == 3 * 16 * 16 * 4 * 9 and three - one == 2 * 16 * 16 * 4 * 9
    pytest.importorskip('mmdet')
    assert get_flops.count_config('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', (), (64, 64)).flops


def test_a_model_that_changes_its_config(mm, load_tool):
    """DINO writes into the settings of its head, which no second model can be built from."""
    pytest.importorskip('mmdet')
    get_flops = load_tool('analysis/get_flops.py')
    path = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
    options = ['model.num_queries=20', 'model.encoder.num_layers=1', 'model.decoder.num_layers=1',
               'model.bbox_head.num_classes=3']
    found = get_flops.count_config(path, options, (64, 64))
    rows = {row.part: row.flops for row in found.rows if not row.kind}
    assert rows['backbone'] > 0 and rows['encoder'] > 0 and rows['decoder'] > 0
    assert found.flops == sum(rows.values()) and rows.get('other', 0) >= 0
    cfg = cli.load_config(path, options)
    before = cfg.model.to_dict()
    assert len({sum(p.numel() for p in cli.build_model(cfg).parameters())
                for _ in range(2)}) == 1
    assert cfg.model.to_dict() == before


def test_new_style_without_a_scope(projects, call, tmp_path):
    config, checkpoint, images = projects('cls')
    new = tmp_path / 'new.py'
    new.write_text(NEW_STYLE.format(root=str(config.parent / 'data')))
    answers = []
    for path in (config, new):
        code, out, err = call('predict.py', path, checkpoint, images)
        assert code == 0, err
        answers.append(re.findall(r'png: (.*%) ->', out))
    assert len(answers[0]) == 6 and answers[0] == answers[1]
    code, out, err = call('test.py', new, checkpoint, '--show-dir', 'shown')
    assert code == 0 and len(list((tmp_path / 'shown').rglob('*.png'))) == 12, err
