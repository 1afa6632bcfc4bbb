"""Checkpoints as real trainers write them: loaded, or refused by a message that says why.

What other packages write is written out here by hand where the package is no dependency.
"""

import argparse
import collections
import functools
import json
import os
import pickle
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from official import S1, classifier_state, random_backbone
from safetensors.torch import save_file
from torch import nn

from vmamba_mm.checkpoints.compare import fit_names
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import describe_places, to_mm
from vmamba_mm.errors import UserError
from vmamba_mm.models import VMamba


@pytest.fixture(scope='module')
def states():
    """A classifier by official names and by ours, and other values in the same shapes."""
    official = classifier_state(random_backbone(S1, (3,)), 10)
    ours = to_mm(official)
    return SimpleNamespace(official=official, ours=ours,
                           other={k: v + 1 for k, v in ours.items()})


def under(prefix, state):
    return {f'{prefix}{k}': v for k, v in state.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def assert_holds(path, states, expected=None, **kwargs):
    found = read_checkpoint(path, **kwargs)
    assert_same(found['state_dict'], states.ours if expected is None else expected)
    assert found['meta']['arch'] == S1 and found['meta']['task'] == 'cls'
    model = VMamba(S1, (3,))
    model.load_pretrained(str(path), weights=kwargs.get('weights', 'auto'))
    backbone = under('backbone.', model.state_dict())
    assert_same(backbone, {k: v for k, v in found['state_dict'].items() if k in backbone})
    return found


# --- wrappers and places ------------------------------------------------------------------------

def compile_inside(state):
    """A compiled stage and head, and a block with activation checkpointing."""
    inner = {'stages.0.': 'stages.0._orig_mod.', 'layers.0.': 'layers.0._orig_mod.',
             'blocks.0.': 'blocks.0._checkpoint_wrapped_module.',
             'head.fc.': 'head._orig_mod.fc.'}
    renamed = {}
    for key, value in state.items():
        for old, new in inner.items():
            key = key.replace(old, new)
        renamed[key] = value
    assert renamed.keys() != state.keys()
    return renamed


@pytest.mark.parametrize('names', ['official', 'ours'])
def test_wrappers_and_places(names, states, tmp_path):
    state = getattr(states, names)
    hyper_parameters = dict(optimizer=functools.partial(torch.optim.SGD, lr=0.1),
                            root=Path('data'), seen=collections.defaultdict(list, a=[1]))
    loss = {'criterion.weight': torch.ones(10), 'train_acc.total': torch.zeros(3),
            'loss_ce.weight': torch.ones(10), 'class_weights': torch.ones(10)}
    lightning = {'pytorch-lightning_version': '2.5.0', 'epoch': 3, 'global_step': 10,
                 'callbacks': {}, 'optimizer_states': [{}],
                 'hyper_parameters': argparse.Namespace(lr=0.1)}
    cases = {
        'compiled inside': compile_inside(state),
        'compiled whole': dict(state_dict=under('_orig_mod.', state)),
        'FSDP': under('_fsdp_wrapped_module.', compile_inside(state)),
        'Lightning, net': dict(lightning, state_dict=under('net.', state) | loss),
        'Lightning, compiled': dict(lightning, state_dict=under('net._orig_mod.', state) | loss),
        'Lightning, module': dict(lightning, state_dict=under('module.', state)),
        'Lightning, deeper': dict(lightning, state_dict=under('task.backbone_net.', state)),
        'Lightning, average': dict(lightning, state_dict={
            'net.n_averaged': torch.tensor(5), **under('net.module.', state)}),
        'average': {'n_averaged': torch.tensor(5), **under('module.', state)},
        'Lightning, hydra': dict(lightning, state_dict=under('net.', state),
                                 hyper_parameters=hyper_parameters),
        'bare, and more': {**state, 'epoch': 3, 'optimizer': {}},
        'tutorial': dict(model_state_dict=state, optimizer_state_dict={}, loss=0.1),
        'DeepSpeed': dict(module=under('module.', state), global_steps=5),
    }
    if names == 'official':
        cases['Lightning, data-parallel'] = dict(lightning,
                                                 state_dict=under('module.', state) | loss)
    else:
        cases['data-parallel children'] = {k.replace('.', '.module.', 1): v
                                           for k, v in state.items()}
    for name, content in cases.items():
        path = tmp_path / f'{name}.pth'
        torch.save(content, path)
        found = assert_holds(path, states)
        assert found['meta'].get('weights') != 'model_ema' or name == 'average'


def test_real_average(tmp_path):
    """torch.optim.swa_utils.AveragedModel of a compiled classifier."""
    model = nn.Module()
    model.backbone = VMamba(S1, (3,))
    model.head = nn.Module()
    model.head.fc = nn.Linear(64, 10)
    model.backbone.stages[1] = torch.compile(model.backbone.stages[1])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')
    assert found['meta']['weights'] == 'model_ema' and found['meta']['arch'] == S1
    assert_same(fit_names(found['state_dict'], model.state_dict()), model.state_dict())


def test_several_or_unclear_places_are_named(states, tmp_path):
    backbone = random_backbone(S1, (3,)).state_dict()
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=under('student.', backbone)
                    | under('teacher.backbone.', backbone)), path)
    with pytest.raises(UserError, match=r"a.pth holds a VMamba under 'student.' and a VMamba "
                                        r"under 'teacher.backbone.': say with prefix="):
        VMamba(S1).load_pretrained(str(path))
    for prefix in ('student', 'teacher.backbone.'):
        model = VMamba(S1, (3,))
        model.load_pretrained(str(path), prefix=prefix)
        assert_same(model.state_dict(), backbone)
    # The place of a head of somebody's own is kept: it may be this very model's.
    own = under('net.', backbone) | {'fc.weight': torch.zeros(2, 64)}
    torch.save(own, path)
    assert_same(read_checkpoint(path)['state_dict'], own)
    assert describe_places(own) == "a VMamba under 'net.', and beside it fc"
    model = VMamba(S1, (3,))
    model.load_pretrained(str(path))
    assert_same(model.state_dict(), backbone)
    with pytest.raises(UserError, match="begin with 'body.', only with: fc, net; it holds a "
                                        "VMamba under 'net.'"):
        model.load_pretrained(str(path), prefix='body')
    torch.save(dict(state_dict=backbone | {'stages.0._orig_mod.blocks.0.ssm.Ds':
                                           backbone['stages.0.blocks.0.ssm.Ds']}), path)
    with pytest.raises(UserError, match='Ds is there twice'):
        read_checkpoint(path)


def test_somebody_elses_model_is_left_alone(tmp_path):
    """Names that only resemble ours."""
    state = {'net._orig_mod.blocks.0.mixer.A_logs': torch.zeros(3), 'net.n_averaged': torch.ones(1)}
    for content in (dict(state_dict=state, meta={}), dict(state_dict=state, meta={}, ema=state)):
        torch.save(content, tmp_path / 'a.pth')
        found = read_checkpoint(tmp_path / 'a.pth')
        assert_same(found['state_dict'], state)
        assert found['meta'] == {} and found.keys() == content.keys()
    torch.save(dict(net=state), tmp_path / 'a.pth')
    assert_same(read_checkpoint(tmp_path / 'a.pth')['net'], state)


def test_whole_models_by_mmengine(mm, states, tmp_path, capsys):
    """mmengine's loader knows no model: places stay, and a wrong one is named."""
    from mmengine.runner import load_checkpoint

    class Own(nn.Module):
        def __init__(self, place, compiled=False):
            super().__init__()
            self.add_module(place, VMamba(S1, (3,)))
            if compiled:
                self.add_module(place, torch.compile(getattr(self, place)))

    for place, compiled in (('net', False), ('backbone', True)):
        source, model = Own(place, compiled), Own(place, compiled)
        torch.save(dict(meta={}, state_dict=source.state_dict()), tmp_path / 'a.pth')
        load_checkpoint(model, str(tmp_path / 'a.pth'))
        assert_same(model.state_dict(), source.state_dict())
    plain = Own('backbone')  # from a compiled one
    load_checkpoint(plain, str(tmp_path / 'a.pth'))
    assert_same(plain.backbone.state_dict(), source.backbone._orig_mod.state_dict())
    torch.save(dict(state_dict=under('net.', states.ours)), tmp_path / 'a.pth')
    with pytest.raises(UserError, match="holds a VMamba under 'net.backbone.', and beside it "
                                        "net.head, and nothing under 'backbone.'"):
        load_checkpoint(plain, str(tmp_path / 'a.pth'))


def test_names_are_fitted_to_the_model(states):
    """What the tools do with any model: its places and wrappers are the model's."""
    compiled = {k.replace('stages.', 'stages._orig_mod.'): v for k, v in states.ours.items()}
    assert_same(fit_names(states.ours, compiled), compiled)
    assert_same(fit_names(compiled, states.ours), states.ours)
    moved = under('model.', states.ours)  # as in a model around this one
    assert_same(fit_names(states.ours, moved), moved)
    assert_same(fit_names(moved, states.ours), states.ours)
    assert_same(fit_names(states.ours | {'criterion.weight': torch.ones(2)}, states.ours),
                states.ours)
    own = states.ours | {'criterion.weight': torch.ones(2)}  # the model has one too
    assert_same(fit_names(own, own), own)


# --- averaged weights -----------------------------------------------------------------------------

def test_averaged_weights(states, tmp_path, capsys):
    """'model' are the raw ones and 'model_ema' the averaged ones, whatever a trainer calls them."""
    raw, averaged = states.other, states.ours
    cases = {
        'timm': dict(state_dict=raw, state_dict_ema=averaged, optimizer={}, epoch=3, version=2,
                     args=argparse.Namespace(lr=0.1)),
        'torchvision': dict(model=raw, model_ema={'n_averaged': torch.tensor(2),
                                                  **under('module.', averaged)}),
        'mmengine': dict(meta=dict(epoch=3), state_dict=averaged, message_hub={},
                         ema_state_dict={'steps': torch.tensor(2), **under('module.', raw)}),
        'Lightning': dict(state_dict=under('net.', averaged),
                          current_model_state=under('net.', raw)),
        'own': dict(net=raw, ema=averaged, opt={}),
    }
    for name, content in cases.items():
        path = tmp_path / f'{name}.pth'
        torch.save(content, path)
        assert assert_holds(path, states)['meta']['weights'] == 'model_ema'
        said = capsys.readouterr().out
        if name != 'mmengine':  # which resumes with both
            assert said.count(f'{path}: taking the averaged weights') == 1 and '--weights' in said
        assert_holds(path, states, weights='model_ema')
        found = assert_holds(path, states, raw, weights='model')
        assert found['meta']['weights'] == 'model' and 'ema_state_dict' not in found
        assert not capsys.readouterr().out
    assert set(read_checkpoint(tmp_path / 'mmengine.pth', 'model')) == {
        'meta', 'state_dict', 'message_hub'}
    torch.save(dict(state_dict=raw), tmp_path / 'one.pth')
    assert_holds(tmp_path / 'one.pth', states, raw, weights='model')
    with pytest.raises(UserError, match="under 'model_ema', only under 'state_dict'"):
        read_checkpoint(tmp_path / 'one.pth', weights='model_ema')
    torch.save(dict(student=raw, teacher=averaged), tmp_path / 'two.pth')
    with pytest.raises(UserError, match="several VMambas, under 'student', 'teacher'"):
        read_checkpoint(tmp_path / 'two.pth')


# --- folders and parts ----------------------------------------------------------------------------

def write_parts(folder, state, suffix):
    folder.mkdir()
    names, stem = list(state), 'model' if suffix == 'safetensors' else 'pytorch_model'
    files = [f'{stem}-0000{i}-of-00002.{suffix}' for i in (1, 2)]
    index = {}
    for file, part in zip(files, (names[:30], names[30:]), strict=True):
        tensors = {k: state[k].contiguous() for k in part}
        (save_file if suffix == 'safetensors' else torch.save)(tensors, folder / file)
        index |= dict.fromkeys(part, file)
    path = folder / f'{stem}.{suffix}.index.json'
    path.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=index)))
    return path, files


@pytest.mark.parametrize('suffix', ['safetensors', 'bin'])
def test_weights_in_parts(suffix, states, tmp_path):
    path, files = write_parts(tmp_path / 'parts', under('net.', states.official), suffix)
    for source in (path, path.parent):
        assert_holds(source, states)
    with pytest.raises(UserError, match=r'is part 2 of 2 .* give its folder, or the file'):
        read_checkpoint(path.parent / files[1])
    index = json.loads(path.read_text())
    for changed, message in (
            (index['weight_map'] | {'net.more': files[0]}, f'net.more is not in .*{files[0]}'),
            (index['weight_map'] | {'net.more': '../other.bin'}, "not safe.*'../other.bin'"),
            (None, 'no weight_map')):
        path.write_text(json.dumps(dict(weight_map=changed)))
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
    path.write_text(json.dumps(index))
    (path.parent / files[1]).unlink()
    with pytest.raises(UserError, match=f'incomplete: its part {files[1]} is missing'):
        read_checkpoint(path.parent)


def test_folders_of_hugging_face(states, tmp_path):
    for metadata in (None, dict(format='pt'), dict(meta='not JSON'), dict(meta='[1]')):
        save_file({k: v.contiguous() for k, v in states.official.items()},
                  tmp_path / 'model.safetensors', metadata=metadata)
        assert_holds(tmp_path, states)
    (tmp_path / 'model.safetensors').unlink()
    torch.save(states.official, tmp_path / 'pytorch_model.bin')
    assert_holds(tmp_path, states)
    (tmp_path / 'pytorch_model.bin').rename(tmp_path / 'epoch_3.pth')
    with pytest.raises(UserError, match='is a folder without .*name one of its files, epoch_3.pth'):
        read_checkpoint(tmp_path)


class Runs:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f'touch {self.witness}',)


def save_distributed(folder, content):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a single process
        dcp.save(content, checkpoint_id=str(folder), no_dist=True)
    return folder


def test_distributed_checkpoints(states, tmp_path):
    """Folders of torch.distributed.checkpoint; what would be unpickled in them is not."""
    witness = tmp_path / 'ran'
    contents = {
        'plain': dict(states.official),
        'state': {'app': {'model': under('net.', states.ours),
                          'optim': {'state': {'0': {'exp_avg': torch.zeros(3)}}}}},
        'hostile value': dict(model=states.official, epoch=3, run=Runs(witness)),
    }
    for name, content in contents.items():
        folder = save_distributed(tmp_path / name, content)
        assert_holds(folder, states)
        with pytest.raises(UserError, match='give its folder'):
            read_checkpoint(folder / '__0_0.distcp')
    metadata = pickle.loads((folder / '.metadata').read_bytes())
    metadata.planner_data['run'] = Runs(witness)
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match='hostile value is not safe to load.*system'):
        read_checkpoint(folder)
    assert not witness.exists()
    part = tmp_path / 'plain/__0_0.distcp'
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(UserError, match='plain cannot be read as a checkpoint'):
        read_checkpoint(part.parent)


# --- programs and whole models ------------------------------------------------------------------

def test_whole_models_are_refused_by_name(tmp_path):
    model, path = random_backbone(S1), tmp_path / 'a.pth'
    cases = {
        'whole': (model, r'whole pickled model \(vmamba_mm.models.vmamba.VMamba\)'),
        'in a dict': (dict(model=model, epoch=3), r'whole pickled model \(vmamba_mm'),
        'of torch': (nn.Sequential(nn.Linear(2, 2)), r'whole pickled model \(torch.nn.modules'),
        'compiled': (torch.compile(model), 'not safe.*whole model'),
    }
    for content, message in cases.values():
        torch.save(content, path)
        with pytest.raises(UserError, match=rf'a.pth .*{message}.*torch.save\(model.state_dict'):
            read_checkpoint(path)
    torch.save(model, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match='whole pickled model'):
        read_checkpoint(path)
    # One beside the weights does no harm: Lightning pickles what it was built from.
    torch.save(dict(state_dict=model.state_dict(), hyper_parameters=nn.MSELoss()), path)
    assert read_checkpoint(path)['meta']['arch'] == S1


class DTensor:
    """Pickles as torch's, which needs the processes that it was spread over."""

    def __reduce__(self):
        return torch._tensor._rebuild_from_type_v2, (torch.Tensor, DTensor, (), {})


def test_share_of_one_process_is_refused_by_name(monkeypatch, tmp_path):
    other = types.ModuleType('elsewhere')
    other.DTensor = DTensor
    monkeypatch.setitem(sys.modules, 'elsewhere', other)
    monkeypatch.setattr(DTensor, '__module__', 'elsewhere')
    torch.save({'layers.0.blocks.0.op.A_logs': DTensor()}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth holds the share of one process.*full_state_dict'):
        read_checkpoint(tmp_path / 'a.pth')


def test_programs_are_refused_by_name(tmp_path):
    linear, path = nn.Linear(2, 2), tmp_path / 'a.pt2'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.jit is deprecated
        torch.jit.save(torch.jit.trace(linear, torch.zeros(1, 2)), path)
    with pytest.raises(UserError, match='a.pt2 is a program of TorchScript.*state_dict'):
        read_checkpoint(path)
    torch.export.save(torch.export.export(linear, (torch.zeros(1, 2),)), path)
    with pytest.raises(UserError, match='a.pt2 is a program of torch.export.*state_dict'):
        read_checkpoint(path)
