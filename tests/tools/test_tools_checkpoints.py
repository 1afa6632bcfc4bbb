"""Official checkpoints through the tools: evaluated, converted, or refused with one line."""

import pytest
import tiny
import torch
from mmengine.fileio import load
from official import S1, classifier_state, random_backbone, save_hostile, save_training_file
from test_tools_errors import assert_one_line

from vmamba_mm.checkpoint import to_mm

ARCH = dict(S1, depths=(1, 1, 1, 1), mlp_ratio=2.0)  # of tiny.BACKBONE


@pytest.fixture
def config(tmp_path):
    tiny.make_cls(tmp_path / 'data', per_class=3)
    path = tmp_path / 'config.py'
    path.write_text(tiny.cls_config(tmp_path / 'data'))
    return path


@pytest.fixture
def official(tmp_path):
    """An official file whose averaged weights always say class 1 and whose others say 0."""
    states = []
    for label in (0, 1):
        state = classifier_state(random_backbone(ARCH, (3,), seed=label), 2)
        state['classifier.head.weight'].zero_()
        state['classifier.head.bias'].copy_(torch.eye(2)[label])
        states.append(state)
    return save_training_file(tmp_path / 'official.pth', *states)


def test_official_file_is_evaluated_as_it_is(config, official, call, tmp_path):
    cases = {(): 1, ('--weights', 'model_ema'): 1, ('--weights', 'model'): 0}
    for options, label in cases.items():
        out = tmp_path / 'pred.pkl'
        code, _, err = call('test.py', config, official, '--out', out, *options)
        assert code == 0, err
        assert {int(sample['pred_label']) for sample in load(str(out))} == {label}


@pytest.mark.parametrize('name, to', [('a.pth', None), ('a.pth', 'mm'), ('a.safetensors', None),
                                      ('a.pth', 'official')])
def test_convert(name, to, config, official, call, tmp_path):
    target = tmp_path / 'out' / name
    code, out, err = call('convert_checkpoint.py', official, target,
                          *(['--to', to] if to else []))
    assert code == 0, err
    assert 'model_ema' in out and 'Written' in out
    assert target.stat().st_size < 0.6 * official.stat().st_size  # without 'model' and the rest
    code, out, err = call('test.py', config, target)
    assert code == 0 and 'accuracy/top1 = 50' in out, err
    if name.endswith('.pth') and to != 'official':
        content = torch.load(target, weights_only=True)
        assert set(content) == {'meta', 'state_dict'}
        assert content['meta']['arch'] == ARCH and content['meta']['task'] == 'cls'
        assert content['meta']['source'] == 'official.pth'
        head = content['state_dict']['head.fc.bias']
        assert head.tolist() == [0, 1] and head.untyped_storage().nbytes() == 8


def test_load_from_official_file(config, official, call):
    code, out, err = call('train.py', config, '--cfg-options', f'load_from={official}',
                          'train_cfg.max_epochs=3')
    assert code == 0, err
    assert f'Load checkpoint from {official}' in out


def test_resume_from_official_file_is_refused(config, official, call):
    assert_one_line(call('train.py', config, '--resume', official), 'weights only', 'load_from=')


def test_predict_with_official_file(config, official, call, tmp_path):
    image = tmp_path / 'data/val/red/0.png'
    code, out, err = call('predict.py', config, official, image)
    assert code == 0, err
    assert 'class 1 73.1 %' in out  # of the logits 0 and 1


@pytest.mark.parametrize('tool', ['test.py', 'train.py', 'predict.py', 'convert_checkpoint.py'])
def test_hostile_file(tool, config, call, tmp_path):
    witness = tmp_path / 'ran'
    state = to_mm(classifier_state(random_backbone(ARCH, (3,)), 2))
    path = save_hostile(tmp_path / 'hostile.pth', state, witness)
    image = tmp_path / 'data/val/red/0.png'
    more = {'test.py': [config, path], 'predict.py': [config, path, image],
            'train.py': [config, '--cfg-options', f'load_from={path}'],
            'convert_checkpoint.py': [path, tmp_path / 'out.pth']}[tool]
    assert_one_line(call(tool, *more), 'hostile.pth is not safe to load', 'system')
    assert not witness.exists() and not (tmp_path / 'out.pth').exists()


def test_convert_refuses(official, call, tmp_path):
    target = tmp_path / 'out.pth'
    content = to_mm(classifier_state(random_backbone(ARCH, (3,)), 2))
    cases = {
        'cut off': (official.read_bytes()[:5000], 'cannot be read'),
        'page': (b'<html>404</html>', 'web page'),
        'half': ({k: v for k, v in content.items() if 'blocks.0.ssm.Ds' not in k}, 'Ds is missing'),
        'more': (content | {'backbone.stages.0.new': torch.zeros(1)}, 'new is not in the model'),
        'other': ({'conv1.weight': torch.zeros(1)}, 'no VMamba'),
    }
    for name, (data, message) in cases.items():
        source = tmp_path / f'{name}.pth'
        if isinstance(data, bytes):
            source.write_bytes(data)
        else:
            torch.save(data, source)
        assert_one_line(call('convert_checkpoint.py', source, target), name, message)
        assert not target.exists()
    assert_one_line(call('convert_checkpoint.py', tmp_path / 'no.pth', target), 'does not exist')
    assert_one_line(call('convert_checkpoint.py', official, tmp_path), 'is a folder')
    assert_one_line(call('convert_checkpoint.py', official, target, '--to', 'safetensors'),
                    '.safetensors')
    assert_one_line(call('convert_checkpoint.py', official, target, '--weights', 'model_ema',
                         '--to', 'safetensors'), 'out.pth')


def test_convert_on_a_full_disk(official, call, tmp_path):
    """A limit of the process on file sizes stands for the end of the disk."""
    target = tmp_path / 'out.pth'
    target.write_bytes(b'old')
    before = sorted(p.name for p in tmp_path.iterdir())
    assert_one_line(call('convert_checkpoint.py', official, target, '--force',
                         max_file_size=20_000),
                    'File too large', target)
    assert target.read_bytes() == b'old'
    assert [n for n in sorted(p.name for p in tmp_path.iterdir())
            if not n.startswith('log')] == [n for n in before if not n.startswith('log')]
