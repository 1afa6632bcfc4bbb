"""tools/check_parity.py agrees with what is right, and with nothing else."""

import json
import sys

import pytest
import tiny
import torch
import toy_parity
from official import SHARED

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES
from vmamba_mm.models import VMamba
from vmamba_mm.testing import Classifier

PARITY = SHARED / 'parity'
KWARGS = dict(patch_size=4, in_chans=3, num_classes=5, depths=[1, 1, 1, 1], dims=8,
              ssm_dt_rank='auto', ssm_act_layer='silu', ssm_conv=3, ssm_d_state=1, ssm_ratio=1.0,
              ssm_conv_bias=False, forward_type='v05_noz', mlp_ratio=2.0, downsample_version='v3',
              patchembed_version='v2')
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
            scan='cross')


@pytest.fixture(scope='module')
def tool():
    sys.path.insert(0, str(tiny.TOOLS))
    try:
        import check_parity
        yield check_parity
    finally:
        sys.path.remove(str(tiny.TOOLS))


@pytest.fixture(scope='module')
def vmamba():
    """The files of a small VMamba: weights by official names, a case with gradients."""
    torch.manual_seed(0)
    model = Classifier(VMamba(ARCH), 5)
    last = [k for k in model.state_dict() if not k.startswith(
        ('backbone.norm0', 'backbone.norm1.', 'backbone.norm2'))]
    x = torch.randn(1, 3, 32, 32).requires_grad_()
    maps, logits = model.backbone(x), model(x)
    up = torch.randn_like(logits)
    logits.backward(up)
    grads = {k: p.grad for k, p in model.named_parameters() if k in last}
    case = dict(input=x, logits=logits, feats=list(maps), grad_logits=up, grad_input=x.grad,
                grad_params=to_official(grads))
    weights = model.state_dict()
    dense = to_official({k: v for k, v in weights.items() if k.startswith('backbone.')})
    return {'own.json': dict(arguments=KWARGS),
            'own.cls.pth': dict(model=to_official({k: weights[k] for k in last})),
            'own.dense.pth': dict(state_dict={
                f'backbone.{k.removeprefix("backbone.")}': v for k, v in dense.items()}),
            'own.expected.pt': dict(kwargs=KWARGS, kind='own', cases=[case])}


@pytest.fixture(scope='module')
def toy():
    return toy_parity.make_files()


@pytest.fixture
def check(tool, tmp_path, request, monkeypatch):
    """check(files, change) -> the rows of a folder with files that a function has changed."""
    monkeypatch.setitem(FAMILIES, 'toy', toy_parity.FAMILY)

    def check(files, change=lambda files: None, dtype=None, only=(), device='cpu'):
        files = json.loads(json.dumps({k: v for k, v in files.items() if k.endswith('.json')})) | \
            {k: toy_parity.copied(v) for k, v in files.items() if not k.endswith('.json')}
        change(files)
        folder = tmp_path / ('toy' if 'net.json' in files else 'numbers')
        toy_parity.save_files(files, folder)
        return list(tool.check_folder(folder, device, dtype, only))

    return check


def failed(rows):
    return [row for row in rows if row.failed]


# --- VMamba -------------------------------------------------------------------------------------

def case(files, number=0, name='own'):
    return files[f'{name}.expected.pt']['cases'][number]


def set_argument(**arguments):
    def change(files):
        files['own.json']['arguments'].update(arguments)
        files['own.expected.pt']['kwargs'].update(arguments)
    return change


def test_what_is_right_passes(check, vmamba):
    rows = check(vmamba)
    assert failed(rows) == []
    compared = {(row.file, row.tensor) for row in rows if row.error is not None}
    assert {('own.cls.pth', f'grad_params.{k}') for k in case(vmamba)['grad_params']} < compared
    assert {('own.dense.pth', f'feats.{i}') for i in range(4)} < compared


@pytest.mark.parametrize(('change', 'tensor'), [
    (lambda f: case(f).update(logits=case(f)['logits'] * 1.0001), 'logits'),
    (lambda f: case(f)['feats'][1].add_(1e-3), 'feats.1'),
    (lambda f: case(f)['feats'].pop(), 'feats'),
    (lambda f: case(f)['logits'].mul_(torch.nan), 'logits'),
    (lambda f: case(f)['grad_input'].neg_(), 'grad_input'),
    (lambda f: case(f)['grad_params']['classifier.head.bias'].zero_(),
     'grad_params.classifier.head.bias'),
    (lambda f: case(f)['grad_params'].pop('classifier.head.bias'),
     'grad_params.head.fc.bias'),
    (lambda f: [case(f).pop(k) for k in ('grad_logits', 'grad_input', 'grad_params')],
     'gradients'),
    (lambda f: case(f).pop('grad_params'), 'grad_params'),
    (lambda f: case(f).pop('grad_input'), 'grad_input'),
    (lambda f: case(f).pop('grad_logits'), 'grad_logits'),
    (lambda f: case(f).pop('logits'), 'logits'),
    (lambda f: case(f).pop('input'), 'input'),
    (lambda f: case(f).update(attention=torch.ones(2)), 'attention'),
    (lambda f: f['own.cls.pth']['model'].pop('layers.0.blocks.0.op.Ds'), 'model'),
    (lambda f: f['own.cls.pth']['model'].update(extra=torch.ones(2)), 'model'),
    (lambda f: f['own.dense.pth']['state_dict'].pop('backbone.layers.0.blocks.0.op.Ds'), 'model'),
    (lambda f: f['own.expected.pt'].update(cases=[]), 'cases'),
    (set_argument(ssm_d_state=2), 'model'),
    (set_argument(patchembed_version='v7'), 'model'),
    (set_argument(forward_type='v05_noz_oact'), 'model'),
    (set_argument(gmlp=True), 'model'),
    (set_argument(window_size=7), 'kwargs.window_size'),
    (lambda f: f['own.json'].update(shape='wide'), 'shape'),
    (lambda f: f['own.json']['arguments'].update(dims=16), 'own.json')], ids=range(25))
def test_what_is_wrong_fails(check, vmamba, change, tensor):
    wrong = failed(check(vmamba, change))
    assert tensor in {row.tensor for row in wrong}, wrong


def test_limits_of_half_precision(check, vmamba):
    assert failed(check(vmamba, dtype='bf16')) == []
    assert failed(check(vmamba, lambda f: case(f)['logits'].neg_(), dtype='bf16'))


def test_half_precision_may_err_twice_as_much_as_plain_pytorch(check, vmamba, monkeypatch):
    from _parity import report

    monkeypatch.setitem(report.LIMITS, ('cpu', 'bf16'), (1e-5, 1e-5))
    assert len(failed(check(vmamba, dtype='bf16'))) > 20  # a CPU has no kernels
    rows = check(vmamba, dtype='bf16', device='cpu:0')  # which stands for a GPU
    assert failed(rows) == [] and any(row.reason == report.TWICE for row in rows)
    ours = report.Report('', FAMILIES['vmamba'].parity, 'cpu', 'bf16')
    ours.rows = [report.Row('', '0', name, error, 1e-5) for name, error in (
        ('y', 3.0), ('y', 0.19), ('y', 1e-6), ('dx', 0.21), ('nan', float('nan')), ('new', 1.0))]
    plain = [report.Row('', '0', name, error, 1e-5) for name, error in (
        ('y', 0.1), ('y', 0.05), ('dx', 0.1), ('nan', float('nan')))]
    ours.allow_twice(plain, first=1)
    assert [row.failed for row in ours.rows] == [True, False, False, True, True, True]
    assert ours.rows[2].reason == ''


@pytest.mark.skipif(not PARITY.is_dir(), reason='no ../shared/parity beside the checkout')
def test_the_official_numbers(tool):
    rows = list(tool.check_folder(PARITY))
    assert failed(rows) == []
    assert {row.file for row in rows} == {
        *(f'{name}.{kind}.pth' for name in ('s1', 's2', 'vanilla') for kind in ('cls', 'dense')),
        'selective_scan.pt'}
    assert {row.reason for row in rows if row.is_omitted} == {
        'is of the backbone with norms, NAME.dense.pth', 'belongs to the classifier, NAME.cls.pth'}


#: The folders beside the checkout, but VMamba's, which is their root.
FOLDERS = [name for f in FAMILIES.values()
           for name in ((f.system or f.name,) * (f.parity is not None) + tuple(f.parity_folders))
           if (PARITY / name).is_dir()]


@pytest.mark.parametrize('folder', FOLDERS)
def test_the_official_numbers_of_every_system(tool, folder):
    rows = list(tool.check_folder(PARITY / folder))
    assert failed(rows) == []
    files = {p.name for p in (PARITY / folder).iterdir()
             if p.suffix in ('.pt', '.pth') and not p.name.endswith('.expected.pt')}
    assert {row.file for row in rows} >= files


# --- a made-up family with every kind of case -----------------------------------------------------

#: What is compared, without the parameters' gradients.
KINDS = {
    'net.pth': {
        '0': {'tokens', 'pooled', 'features', 'inner.0', 'inner.1', 'grad_input', 'grad_mask',
              'grad_params_strided.enc.weight.value', 'grad_params_strided.enc.weight.sum_sq'},
        '0 paper': {'tokens', 'grad_input', 'grad_mask'},
        '1 train': {'tokens', 'grad_input', 'buffers_after.bn.running_mean',
                    'buffers_after.bn.running_var', 'buffers_after.bn.num_batches_tracked'},
        '2 amplify': {'output'},
        '3 slow': {'output', 'state.last', 'state.count'},
        '4 pair': {'losses.0', 'grad_input.0', 'grad_input.1'}},
    'projector.pth': {'0': {'output', 'grad_input'}},
    'start.pth': {'': {'place', 'embed.bias'}},
    'op_decay.pt': {'0': {'y', 'total', 'grads.x', 'grads.gain'},
                    '0 shifted': {'y', 'grads.x', 'grads.gain'}, '1': {'y'},
                    'layers 0': {'output', 'grad_input'}}}
PARAMETERS = {'enc.weight', 'enc.bias', 'bn.weight', 'bn.bias', 'shift', 'spare', 'place'}


def test_every_kind_of_case_is_compared(check, toy):
    rows = check(toy)
    assert failed(rows) == []
    compared, parameters = {}, {}
    for row in rows:
        if row.error is not None:
            name = row.tensor.removeprefix('grad_params.')
            group = compared if name == row.tensor else parameters
            group.setdefault(row.file, {}).setdefault(row.case, set()).add(name)
    assert compared == KINDS
    assert parameters == {
        'net.pth': {'0': PARAMETERS - {'enc.weight'}, '0 paper': PARAMETERS, '4 pair': PARAMETERS},
        'projector.pth': {'0': {'0.weight', '0.bias'}},
        'op_decay.pt': {'layers 0': {'weight', 'bias'}}}
    assert {(row.tensor, row.reason) for row in rows if row.is_omitted} == {
        ('seed', 'drew the masks'), ('draws', 'counts random numbers'),
        ('grad_params', 'a case in train mode has none'), ('start.expected.pt', 'it only loads')}
    assert [(row.limit, row.reason) for row in rows if row.tensor == 'features'] == [
        (1e-3, 'its table is of fp16')]
    assert {row.limit for row in rows if row.file == 'op_decay.pt'} == {1e-10, None}
    assert {row.limit for row in check(toy, dtype='fp32', only=['op_decay'])} == {1e-5, 1e-4, None}


def net(number):
    return lambda files: case(files, number, 'net')


def scale(case_of, *path, by=1.01):
    """Change one tensor, or number, of the expected ones."""
    def change(files):
        value = case_of(files)
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = value[path[-1]] * by
    return change


def drop(case_of, key):
    return lambda files: case_of(files).pop(key)


def ops(section, number=None):
    return lambda files: (files['op_decay.pt'][section] if number is None
                          else files['op_decay.pt'][section][number])


@pytest.mark.parametrize(('change', 'file', 'name', 'tensor'), [
    (scale(net(0), 'pooled'), 'net.pth', '0', 'pooled'),
    (scale(net(0), 'mask'), 'net.pth', '0', 'tokens'),
    (scale(net(0), 'times', by=2), 'net.pth', '0', 'tokens'),
    (scale(net(0), 'features'), 'net.pth', '0', 'features'),
    (scale(net(0), 'inner', 1), 'net.pth', '0', 'inner.1'),
    (scale(net(0), 'grad_mask'), 'net.pth', '0', 'grad_mask'),
    (drop(net(0), 'grad_mask'), 'net.pth', '0', 'grad_mask'),
    (scale(net(0), 'grad_params', 'bn.bias'), 'net.pth', '0', 'grad_params.bn.bias'),
    (lambda f: net(0)(f)['grad_params'].update({'bn.bias': None}), 'net.pth', '0',
     'grad_params.bn.bias'),
    (lambda f: net(0)(f)['grad_params'].update(spare=torch.ones(2)), 'net.pth', '0',
     'grad_params.spare'),
    (lambda f: net(0)(f)['grad_params'].update(shift=torch.tensor(0.3)), 'net.pth', '0',
     'grad_params.shift'),
    (lambda f: net(0)(f)['grad_params'].update(other=torch.ones(2)), 'net.pth', '0',
     'grad_params.other'),
    (scale(net(0), 'grad_params_strided', 'enc.weight', 'value'), 'net.pth', '0',
     'grad_params_strided.enc.weight.value'),
    (scale(net(0), 'grad_params_strided', 'enc.weight', 'sum_sq'), 'net.pth', '0',
     'grad_params_strided.enc.weight.sum_sq'),
    (drop(net(0), 'grad_params_strided'), 'net.pth', '0', 'grad_params.enc.weight'),
    (scale(net(0), 'tokens_paper'), 'net.pth', '0 paper', 'tokens'),
    (scale(net(0), 'grad_params_paper', 'place'), 'net.pth', '0 paper', 'grad_params.place'),
    (scale(net(1), 'buffers_after', 'bn.running_var'), 'net.pth', '1 train',
     'buffers_after.bn.running_var'),
    (drop(net(1), 'mode'), 'net.pth', '1', 'tokens'),
    (scale(net(2), 'factor'), 'net.pth', '2 amplify', 'output'),
    (lambda f: net(2)(f).update(kind='other'), 'net.pth', '2 other', 'output'),
    (scale(net(3), 'state', 'count', by=2), 'net.pth', '3 slow', 'state.count'),
    (scale(net(4), 'grad_input', 1), 'net.pth', '4 pair', 'grad_input.1'),
    (lambda f: f['net.expected.pt'].update(table=torch.ones(2)), 'net.pth', '', 'table'),
    (lambda f: [f[k]['kwargs'].update(act='gelu') for k in ('net.json', 'net.expected.pt')],
     'net.pth', '', 'model'),
    (lambda f: [f[k]['kwargs']['sizes'].update(depth=2) for k in ('net.json', 'net.expected.pt')],
     'net.pth', '', 'kwargs.sizes.depth'),
    (scale(lambda f: f['start.pth'], 'placed'), 'start.pth', '', 'place'),
    (lambda f: f['projector.pth'].update(model={}), 'projector.pth', '', 'model'),
    (scale(ops('cases', 0), 'grads', 'gain'), 'op_decay.pt', '0', 'grads.gain'),
    (scale(ops('cases', 0), 'y_shifted', by=1 + 1e-9), 'op_decay.pt', '0 shifted', 'y'),
    (scale(ops('cases', 0), 'power', by=2), 'op_decay.pt', '0', 'y'),
    (lambda f: ops('cases', 0)(f).update(eps=1e-6), 'op_decay.pt', '0', 'eps'),
    (lambda f: ops('cases', 0)(f)['grads'].update(power=torch.ones(2)), 'op_decay.pt', '0',
     'grads.power'),
    (drop(ops('cases', 0), 'grads'), 'op_decay.pt', '0', 'grad_x'),
    (drop(ops('layers'), 'state_dict'), 'op_decay.pt', 'layers 0', 'model'),
    (scale(ops('layers'), 'grad_params', 'weight'), 'op_decay.pt', 'layers 0',
     'grad_params.weight'),
    (lambda f: f['op_decay.pt'].update(numbers=[1, 2]), 'op_decay.pt', '', 'op_decay.pt'),
    (lambda f: f.update({'op_other.pt': f['op_decay.pt']}), 'op_other.pt', '', 'op_other.pt'),
    (lambda f: f.update({'net.json': ['kwargs']}), 'net', '', 'net.json'),
], ids=range(39))
def test_every_kind_of_case_can_fail(check, toy, change, file, name, tensor):
    wrong = failed(check(toy, change))
    assert (file, name, tensor) in {row[:3] for row in wrong}, wrong


# --- files and folders ----------------------------------------------------------------------------

@pytest.mark.parametrize(('name', 'content', 'tensor', 'problem'), [
    ('own.json', b'{"arguments": ', 'own.json', 'cannot be read'),
    ('own.expected.pt', b'no tensors', 'own.expected.pt', 'cannot be read'),
    ('own.cls.pth', b'no tensors', 'model', 'cannot be read'),
    ('own.dense.pth', b'', 'model', 'is empty'),
    ('own.json', None, 'own.json', 'No such file'),
    ('own.expected.pt', None, 'own.expected.pt', 'does not exist'),
    ('own.dense.pth', None, 'own.dense.pth', 'does not exist'),
    ('selective_scan.pt', b'no tensors', 'selective_scan.pt', 'cannot be read'),
    ('op_other.pt', b'', 'op_other.pt', 'the family knows no op or layer for it'),
    ('own.pth', b'', '', 'belongs to no NAME.json')])
def test_files_that_cannot_be_read(tool, vmamba, tmp_path, name, content, tensor, problem):
    toy_parity.save_files(vmamba, tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    wrong = failed(tool.check_folder(tmp_path))
    assert [row.tensor for row in wrong] == [tensor] and problem in wrong[0].problem, wrong


def test_folders_of_no_family(tool, vmamba, tmp_path):
    toy_parity.save_files(vmamba, tmp_path / 'vmamba')
    assert failed(tool.check_folder(tmp_path / 'vmamba')) == []
    (tmp_path / 'vmamba').rename(tmp_path / 'unheard_of')
    assert failed(tool.check_folder(tmp_path / 'unheard_of')) == []  # by its files the root
    for path in (tmp_path / 'unheard_of').glob('*.cls.pth'):
        path.unlink()
    with pytest.raises(UserError, match="no family 'unheard_of' to compare, only vmamba"):
        list(tool.check_folder(tmp_path / 'unheard_of'))
    with pytest.raises(UserError, match='nowhere does not exist'):
        list(tool.check_folder(tmp_path / 'nowhere'))
    (tmp_path / 'vmamba').mkdir()
    with pytest.raises(UserError, match='holds no NAME.json'):
        list(tool.check_folder(tmp_path / 'vmamba'))


def test_the_table(tool, vmamba, tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['check_parity.py', str(tmp_path), *map(str, args)])
        tool.main()

    toy_parity.save_files(vmamba, tmp_path)
    run()
    *table, summary = capsys.readouterr().out.splitlines()
    assert 'not compared: is of the backbone with norms' in table[0]
    assert ', 0 failures; nearest to its limit: own.' in summary
    file, _, tensor = table[-1].split()[:3]
    assert f'{file}, case 0, {tensor}: ' in summary
    run(tmp_path, '--only', 'own')
    both = capsys.readouterr().out
    assert both.count(f'{tmp_path.name}/own.cls.pth') > 2 * len(case(vmamba)['grad_params'])
    with pytest.raises(UserError, match='nothing is called other there'):
        run('--only', 'other')


def test_the_command(vmamba, call, tmp_path):
    toy_parity.save_files(vmamba, tmp_path)
    expected = toy_parity.copied(vmamba['own.expected.pt'])
    expected['cases'][0]['logits'].mul_(1.01)
    torch.save(expected, tmp_path / 'own.expected.pt')
    code, out, err = call('check_parity.py', tmp_path, '--only', 'own')
    worst = out.splitlines()[-2]
    assert code == 1 and '1 of ' in err and 'rows failed' in err
    assert worst.split()[:3] == ['own.cls.pth', '0', 'logits'] and worst.endswith('FAILED')
