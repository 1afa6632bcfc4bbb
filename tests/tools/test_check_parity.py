"""tools/check_parity.py agrees with what is right, and with nothing else."""

import json
import sys

import pytest
import tiny
import torch
from official import SHARED

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.models import VMamba

PARITY = SHARED / 'parity'
KWARGS = dict(patch_size=4, in_chans=3, num_classes=5, depths=[1, 1, 1, 1], dims=8,
              ssm_dt_rank='auto', ssm_act_layer='silu', ssm_conv=3, ssm_d_state=1, ssm_ratio=1.0,
              ssm_conv_bias=False, forward_type='v05_noz', mlp_ratio=2.0, downsample_version='v3',
              patchembed_version='v2')


@pytest.fixture(scope='module')
def tool():
    sys.path.insert(0, str(tiny.TOOLS))
    try:
        import check_parity
        yield check_parity
    finally:
        sys.path.remove(str(tiny.TOOLS))


@pytest.fixture(scope='module')
def made(tool):
    """What the files of a small model hold: weights by official names, a case with gradients."""
    torch.manual_seed(0)
    backbone = VMamba(tool.vmamba_arch(KWARGS))
    head = torch.nn.Linear(64, 5)
    weights = {f'backbone.{k}': v for k, v in backbone.state_dict().items()}
    dense = to_official(weights)
    only_last = {k: v for k, v in weights.items() if not k.startswith(('backbone.norm0',
                                                                      'backbone.norm1.',
                                                                      'backbone.norm2'))}
    fc = {f'head.fc.{k}': v for k, v in head.state_dict().items()}
    x = torch.randn(1, 3, 32, 32).requires_grad_()
    maps = backbone(x)
    logits = head(maps[3].mean((2, 3)))
    grad = torch.randn_like(logits)
    logits.backward(grad)
    grads = {f'backbone.{k}': p.grad for k, p in backbone.named_parameters()
             if f'backbone.{k}' in only_last}
    grads |= {f'head.fc.{k}': p.grad for k, p in head.named_parameters()}
    case = dict(input=x.detach(), logits=logits.detach(), feats=[m.detach() for m in maps],
                grad_logits=grad, grad_input=x.grad, grad_params=to_official(grads))
    return dict(cls=to_official(only_last | fc), dense=dense, cases=[case])


@pytest.fixture
def check(tool, made, tmp_path):
    """check(change) -> the failed rows of a folder whose content a function has changed."""
    def check(change=lambda content: None, **kwargs):
        copied = dict(cls=dict(made['cls']), dense=dict(made['dense']), cases=[
            {k: dict(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v
             for k, v in case.items()} for case in made['cases']], kwargs=dict(KWARGS))
        change(copied)
        torch.save(dict(model=copied['cls']), tmp_path / 'own.cls.pth')
        torch.save(dict(state_dict={f'backbone.{k.removeprefix("backbone.")}': v
                                    for k, v in copied['dense'].items()}),
                   tmp_path / 'own.dense.pth')
        torch.save(dict(kwargs=copied['kwargs'], cases=copied['cases']),
                   tmp_path / 'own.expected.pt')
        (tmp_path / 'own.json').write_text(json.dumps(dict(arguments=copied['kwargs'])))
        rows = list(tool.check_folder(tmp_path, 'cpu', kwargs.get('dtype', 'fp32'), []))
        assert rows
        return [row for row in rows if row.failed]

    return check


def test_what_is_right_passes(check):
    assert check() == []


def case(content):
    return content['cases'][0]


@pytest.mark.parametrize(('change', 'tensor'), [
    (lambda c: case(c).update(logits=case(c)['logits'] * 1.0001), 'logits'),
    (lambda c: case(c)['feats'].__setitem__(1, case(c)['feats'][1] + 1e-3), 'map 1'),
    (lambda c: case(c)['feats'].pop(), 'feats'),
    (lambda c: case(c).update(logits=case(c)['logits'] * torch.nan), 'logits'),
    (lambda c: case(c).update(grad_input=-case(c)['grad_input']), 'gradient by input'),
    (lambda c: case(c)['grad_params'].update({'classifier.head.bias': torch.zeros(5)}),
     'gradient by head.fc.bias'),
    (lambda c: case(c)['grad_params'].pop('classifier.head.bias'), 'gradient by head.fc.bias'),
    (lambda c: [case(c).pop(k) for k in ('grad_logits', 'grad_input', 'grad_params')],
     'grad_params'),
    (lambda c: case(c).pop('grad_params'), 'grad_params'),
    (lambda c: case(c).pop('logits'), 'logits'),
    (lambda c: case(c).update(attention=torch.ones(2)), 'attention'),
    (lambda c: c['cls'].pop('layers.0.blocks.0.op.Ds'), 'model'),
    (lambda c: c['cls'].update(extra=torch.ones(2)), 'model'),
    (lambda c: c['dense'].pop('backbone.layers.0.blocks.0.op.Ds', None)
     or c['dense'].pop('layers.0.blocks.0.op.Ds'), 'model'),
    (lambda c: c['kwargs'].update(ssm_d_state=2), 'model'),
    (lambda c: c['kwargs'].update(patchembed_version='v7'), 'model')],
    ids=range(16))
def test_what_is_wrong_fails(check, change, tensor):
    failed = check(change)
    assert tensor in {row.tensor for row in failed}, failed


def test_limits_of_half_precision(check):
    assert check(dtype='bf16') == []
    assert check(lambda c: case(c).update(logits=-case(c)['logits']), dtype='bf16')


def test_files_that_are_not_there(tool, check, tmp_path):
    check()
    (tmp_path / 'own.json').unlink()
    (tmp_path / 'own.dense.pth').unlink()
    problems = {row.problem for row in tool.check_folder(tmp_path, 'cpu', 'fp32', [])}
    assert problems == {'does not exist'}
    (tmp_path / 'own.cls.pth').unlink()
    with pytest.raises(UserError, match='no system that is known'):
        list(tool.check_folder(tmp_path, 'cpu', 'fp32', []))


def test_the_command(check, call, tmp_path):
    check()
    code, out, err = call('check_parity.py', tmp_path)
    assert code == 0 and ', 0 failures; nearest to its limit: own.' in out, err
    (tmp_path / 'own.json').write_text('{"arguments": {}}')
    code, out, err = call('check_parity.py', tmp_path, '--only', 'own')
    assert code == 1 and 'own.json' in out and 'comparisons failed' in err
    assert call('check_parity.py', tmp_path, '--only', 'other')[0] == 1


@pytest.mark.skipif(not PARITY.is_dir(), reason='no ../shared/parity beside the checkout')
def test_the_official_numbers(tool):
    rows = list(tool.check_folder(PARITY, 'cpu', 'fp32', []))
    assert [row for row in rows if row.failed] == []
    assert {row.file for row in rows} == {
        *(f'{name}.{kind}.pth' for name in ('s1', 's2', 'vanilla') for kind in ('cls', 'dense')),
        'selective_scan.pt'}
