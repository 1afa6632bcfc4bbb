"""Official checkpoints through the tools: evaluated, converted, or refused with one line."""

import pytest
import tiny
import torch
from mmengine.fileio import load
from official import S1, classifier_state, random_backbone, save_hostile, save_training_file
from test_tools_errors import assert_one_line

from vmamba_mm.checkpoints.names import to_mm

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


def test_convert_a_language_model(call, tmp_path):
    """To our names and back to those of mamba_ssm, which reads a file of weights alone."""
    from vmamba_mm.models import CausalLM

    model = CausalLM(mixer='mamba', vocab_size=9, embed_dims=16, depth=2)
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    for source, target, options in (('ours.pth', 'a.bin', ['--to', 'official']),
                                    ('a.bin', 'a.safetensors', [])):
        code, out, err = call('convert_checkpoint.py', tmp_path / source, tmp_path / target,
                              *options)
        assert code == 0 and 'Left out' not in out, out + err
    content = torch.load(tmp_path / 'a.bin', weights_only=True)
    assert torch.equal(content['lm_head.weight'], content['backbone.embedding.weight'])
    assert torch.equal(content['backbone.layers.1.mixer.D'], model.blocks[1].mixer.D)
    found = CausalLM.from_pretrained(tmp_path / 'a.safetensors')
    ids = torch.arange(9)[None]
    assert torch.equal(found(ids), model(ids)) and found.is_tied
    del content['backbone.norm_f.weight']
    torch.save(content, tmp_path / 'part.bin')
    assert_one_line(call('convert_checkpoint.py', tmp_path / 'part.bin', tmp_path / 'b.pth'),
                    'part.bin', 'norm.weight is missing')


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
    assert_one_line(call('convert_checkpoint.py', official, target, '--family', 'swin'),
                    '--family swin does not exist; choose one of')
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


def test_convert_overwrites_nothing(official, call, tmp_path):
    """A training checkpoint is the only one of its kind; the input is never written onto."""
    own = tmp_path / 'epoch_3.pth'
    state = to_mm(classifier_state(random_backbone(ARCH, (3,)), 2))
    torch.save(dict(meta=dict(epoch=3, iter=9), state_dict=state, optimizer=dict(state={}),
                    message_hub={}), own)
    before = own.read_bytes()
    names = {'relative': 'epoch_3.pth', 'dotted': f'{tmp_path}/data/../epoch_3.pth',
             'symlink': 'soft.pth', 'hard link': 'hard.pt'}
    (tmp_path / 'data').mkdir()
    (tmp_path / 'soft.pth').symlink_to(own)
    (tmp_path / 'hard.pt').hardlink_to(own)
    for target in names.values():
        assert_one_line(call('convert_checkpoint.py', own, target, '--to', 'official', '--force'),
                        target, 'is the input itself')
    target = tmp_path / 'other.pth'
    target.write_bytes(b'old')
    assert_one_line(call('convert_checkpoint.py', own, target), target, 'exists', '--force')
    assert target.read_bytes() == b'old'
    for name in ('own.onnx', 'own.pt2', 'own', 'own.txt'):
        assert_one_line(call('convert_checkpoint.py', tmp_path / 'no.pth', name), name,
                        '.pth, .pt, .bin, .ckpt, .safetensors')
    code, out, err = call('convert_checkpoint.py', own, target, '--force', '--family', 'vmamba')
    assert code == 0 and 'Left out: optimizer, message_hub\n' in out, err
    content = torch.load(target, weights_only=True)
    assert len(content['state_dict']) == len(state) and content['meta']['family'] == 'vmamba'
    assert own.read_bytes() == before


def test_checkpoints_of_other_trainers(config, call, tmp_path):
    """From Lightning through every tool; what cannot be told is named by its place."""
    model = random_backbone(ARCH, (3,))
    state = to_mm(classifier_state(model, 2))
    lightning = tmp_path / 'last.ckpt'
    content = {'state_dict': {f'net.{k}': v for k, v in state.items()}
               | {'criterion.weight': torch.ones(2)},
               'optimizer_states': [{}], 'pytorch-lightning_version': '2.5.0'}
    torch.save(content, lightning)
    folder = tmp_path / 'folder'
    code, out, err = call('convert_checkpoint.py', lightning, folder / 'model.safetensors')
    assert code == 0, err
    assert 'Left out: optimizer_states, pytorch-lightning_version, criterion.weight\n' in out
    assert_one_line(call('convert_checkpoint.py', folder, folder / 'model.safetensors', '--force'),
                    'is the input itself')
    code, out, err = call('convert_checkpoint.py', folder, tmp_path / 'again.bin')
    assert code == 0 and 'Left out' not in out, err
    found = torch.load(tmp_path / 'again.bin', weights_only=True)['state_dict']
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    code, out, err = call('test.py', config, lightning)  # by mmengine's loader
    assert code == 0 and 'accuracy/top1' in out, err
    code, out, err = call('predict.py', config, folder, tmp_path / 'data/val/red/0.png')
    assert code == 0, err
    # Its own head beside a bare backbone: nobody can say what it is to this model.
    backbone = {f'net.{k}': v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=backbone | {'fc.weight': torch.zeros(2, 64)}), lightning)
    named = "a VMamba under 'net.', and beside it fc"
    assert_one_line(call('convert_checkpoint.py', lightning, tmp_path / 'no.pth'), named)
    assert_one_line(call('test.py', config, lightning), 'fc.weight', 'head.fc.weight is missing')
    torch.save(model, lightning)
    assert_one_line(call('test.py', config, lightning), 'last.ckpt', 'whole pickled model')


@pytest.fixture
def of_two_families(tmp_path):
    """A VideoMamba of images by its official names, which are those of a Vim, and ours of it."""
    from specs import SPECS

    spec = SPECS['videomamba']
    model = spec.random_model(spec.archs['image'])
    path = tmp_path / 'a.pth'
    torch.save(dict(model=spec.official_classifiers(model, 3)[0]), path)
    return path, model


def test_names_of_two_families_are_converted_if_one_is_named(of_two_families, call, tmp_path):
    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.families import family_of

    path, model = of_two_families
    target = tmp_path / 'ours.pth'
    assert_one_line(call('convert_checkpoint.py', path, target), 'a.pth: the weights under',
                    'named like those of Vim and of VideoMamba: say which of the families it is',
                    '--family vim or --family videomamba')
    assert not target.exists()
    code, out, err = call('convert_checkpoint.py', path, target, '--family', 'videomamba')
    assert code == 0 and 'VideoMamba of its own, task cls' in out, err
    content = torch.load(target, weights_only=True)
    assert content['meta']['family'] == 'videomamba' and content['meta']['arch'] == model.arch
    assert family_of(content['state_dict']).name == 'videomamba'  # our names tell
    # Back to official names, with a word beside them.
    again = tmp_path / 'official.pth'
    torch.save(dict(content, state_dict=torch.load(path)['model']), again)
    state = read_checkpoint(again)['state_dict']
    assert all(torch.equal(v, content['state_dict'][k]) for k, v in state.items())


def test_a_name_of_the_zoo_tells_the_family(of_two_families, monkeypatch):
    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.errors import UserError

    path, model = of_two_families
    monkeypatch.setattr('vmamba_mm.checkpoints.files.weights_of', lambda name: str(path))
    state = read_checkpoint('vmamba_mm://videomamba/tiny', keep_places=True)['state_dict']
    assert all(torch.equal(v, state[f'backbone.{k}']) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match='Vim and of VideoMamba'):
        read_checkpoint('vmamba_mm://vmamba/tiny_s1l8')  # it is of neither


def test_the_model_that_weights_are_for_tells_the_family(of_two_families, monkeypatch):
    """Of the tools it is that of the config; and of what was published the zoo knows."""
    from mmengine.config import Config

    from vmamba_mm import zoo
    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.errors import UserError
    from vmamba_mm.families import FAMILIES
    from vmamba_mm.mm import cli

    path, model = of_two_families
    cfg = Config(dict(model=dict(type='Distiller', parts=[
        dict(backbone=dict(type='vmamba_mm.VideoMamba')), dict(type='VMamba')])))
    likely = cli.families_of(cfg)
    assert [family.name for family in likely] == ['vmamba', 'videomamba']
    state = read_checkpoint(path, keep_places=True, likely=likely)['state_dict']
    assert set(model.state_dict()) == {k.removeprefix('backbone.') for k in state
                                       if not k.startswith('head.')}
    for nobody in ((), [FAMILIES['vmamba']], [FAMILIES['vim'], FAMILIES['videomamba']]):
        with pytest.raises(UserError, match='of Vim and of VideoMamba: say which'):
            read_checkpoint(path, likely=nobody)
    assert cli.families_of(Config(dict(work_dir='a'))) == []
    # The address that mmpretrain's hub has.
    address = zoo.find('videomamba/tiny').weights
    monkeypatch.setattr('vmamba_mm.checkpoints.files.fetch', lambda source: path)
    assert set(read_checkpoint(address)['state_dict']) == set(state)
