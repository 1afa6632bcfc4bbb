"""Configs in mmengine's pure Python style: imports, read_base, classes as types."""

import json
import shutil

import tiny


def test_all_tools(call, tmp_path):
    tiny.make_cls(tmp_path / 'data', per_class=2)
    text = tiny.cls_config(tmp_path / 'data', workers=0, epochs=4)
    (tmp_path / 'base.py').write_text(tiny.new_style(text))
    config = tmp_path / 'leaf.py'
    config.write_text('from mmengine.config import read_base\n'
                      'with read_base():\n    from .base import *\n'
                      'train_cfg.update(max_epochs=3)\n')
    code, _, err = call('train.py', config, '--work-dir', tmp_path / 'w', '--cfg-options',
                        'model.head.type=LinearClsHead')
    assert code == 0, err
    # It has every type as a full path, which is a fourth way to write one.
    dumped = shutil.copy(tmp_path / 'w' / 'leaf.py', tmp_path / 'dumped.py')
    words = dumped.read_text()
    assert words.count('LocalVisBackend') == 1 and 'vmamba_mm.AtomicCheckpointHook' in words
    assert "'mmengine.optim.OptimWrapper'" in words or "type='OptimWrapper'" in words

    metrics = {}
    checkpoint = tmp_path / 'w' / 'epoch_3.pth'
    for name, file in (('classes', config), ('paths', dumped)):
        code, _, err = call('test.py', file, checkpoint, '--tta', '--out',
                            tmp_path / f'{name}.json')
        assert code == 0, err
        metrics[name] = json.loads((tmp_path / f'{name}.json').read_text())
    assert metrics['classes'] == metrics['paths'] and 'accuracy/top1' in metrics['paths']

    code, _, err = call('test.py', config, checkpoint, '--show-dir', tmp_path / 'drawn')
    assert code == 0, err
    assert list((tmp_path / 'drawn').rglob('*.png'))
