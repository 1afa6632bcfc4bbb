"""The ops in plain PyTorch, without nodes of our own: for exporters and tracers."""

import re

import pytest
import torch
from op_specs import all_specs

from vmamba_mm.ops import selective_scan, ssd
from vmamba_mm.ops.core.define_op import OPS
from vmamba_mm.ops.plain import FORMS, plain_ops
from vmamba_mm.ops.plain.recurrence import WAYS
from vmamba_mm.testing import assert_close

#: What states are asked of: language models, which are not exported.
STATES = 'wkv with states', 'wkv6 with states'
CASES = [pytest.param(spec.name.removesuffix('_fwd'), spec, shape, id=f'{spec}-{shape}')
         for spec in all_specs() if spec.name in FORMS and str(spec) not in STATES
         for shape in spec.shapes]


def test_every_op_on_a_cpu_has_a_form():
    """But RWKV-7's, of language models, and whole blocks, which layers ask for on GPUs alone."""
    on_cpu = {name for name, op in OPS.items()
              if any(i.why_not is None for i in op.implementations.values())}
    blocks = {name for name in on_cpu if 'block' in name}
    assert on_cpu - set(FORMS) - blocks == {'wkv7_fwd'}


@pytest.mark.parametrize('op, spec, shape', CASES)
@pytest.mark.parametrize('way', ['unrolled', 'first'])
def test_form_is_the_op(op, spec, shape, way):
    inputs = spec.make(*shape)
    expected = spec.call(inputs)
    try:
        with plain_ops(way), torch.no_grad():
            found = spec.call(inputs)
    except NotImplementedError as err:
        assert 'has no form for other runtimes' in str(err)
        return  # several sequences in one, which only language models ask for
    for result, wanted in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, expected)),
                              strict=True):
        assert_close(result, wanted, 1e-10)


def test_unknown_way():
    with pytest.raises(ValueError, match='way.*choose one of'), plain_ops('by hand'):
        pass
    assert WAYS


class _Scans(torch.nn.Module):
    def forward(self, x):
        u = x.transpose(1, 2)
        y = selective_scan(u, u.sigmoid(), -torch.ones(u.shape[1], 2), *(
            u[:, None, i:i + 2] for i in (0, 2)))
        heads = x.unflatten(2, (-1, 2))
        dt = heads[..., 0].sigmoid()
        return ssd(heads, dt, -torch.ones(heads.shape[2]), heads[:, :, :1], heads[:, :, 1:2]) \
            .flatten(2) + y.transpose(1, 2)


@pytest.mark.parametrize('record', [
    lambda module, x: torch.export.export(module, (x,), strict=True).module(),
    lambda module, x: torch.export.export(module, (x,), strict=False).module(),
    torch.jit.trace], ids=['strict', 'not strict', 'traced'])
def test_recorded_without_our_ops(record):
    x, module = torch.randn(2, 9, 8), _Scans()
    with plain_ops(), torch.no_grad():
        recorded = record(module, x)
    assert not re.search(r'vmamba_mm(::|\.\w+\.default)', str(recorded.graph))
    assert_close(recorded(x), module(x), 1e-5)
