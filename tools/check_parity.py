"""Compare our models with numbers of the official code: outputs and every gradient.

A folder holds, for each model, the official checkpoint, the official constructor arguments, and
cases with inputs, outputs and gradients that the official code gave on a CPU. The folder's name is
the system; files of VMamba are NAME.cls.pth (a classifier), NAME.dense.pth (its backbone with a
norm for each output) and NAME.expected.pt, and op_*.pt or selective_scan.pt hold cases of an op.
Errors are relative 2-norms. What is above its limit, missing, not compared or unknown is a failure,
and the exit code is then 1.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/check_parity.py ../shared/parity
  python tools/check_parity.py ../shared/parity --only s1 vanilla --device cuda
  python tools/check_parity.py ../shared/parity --dtype bf16"""

#: (outputs, gradients) by device and dtype; of fp32 on a GPU the sums have another order.
LIMITS = {('cpu', 'fp32'): (1e-5, 1e-4), ('cuda', 'fp32'): (1e-4, 1e-3),
          ('cpu', 'fp16'): (5e-3, 5e-2), ('cuda', 'fp16'): (5e-3, 5e-2),
          ('cpu', 'bf16'): (5e-2, 3e-1), ('cuda', 'bf16'): (5e-2, 3e-1)}


#: of the files of one model; any of them asks for the others
SUFFIXES = ('.cls.pth', '.dense.pth', '.expected.pt')


class Row(NamedTuple):
    """One comparison; ``problem`` in place of an error where there was none to make."""

    file: str
    case: str
    tensor: str
    error: float | None
    limit: float | None
    problem: str = ''

    @property
    def failed(self) -> bool:
        return bool(self.problem) or not self.error <= self.limit  # NaN fails


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('folders', metavar='FOLDER', nargs='+', type=Path)
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    parser.add_argument('--dtype', choices=('fp32', 'fp16', 'bf16'), default='fp32',
                        help='of the model and its input (default: fp32)')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME',
                        help='the files of these names alone, such as s1')
    cli.add_traceback_option(parser)
    return parser.parse_args()


# --- comparing ------------------------------------------------------------------------------------

class Comparison:
    """Collects the rows of one file.

    Args:
        file: its name.
        limits: of outputs and gradients.
    """

    def __init__(self, file: str, limits: tuple[float, float]):
        self.file, self.limits, self.rows = file, limits, []

    def fail(self, case: str, tensor: str, problem: str) -> None:
        self.rows.append(Row(self.file, case, tensor, None, None, problem))

    def compare(self, case: str, tensor: str, found, expected, gradient: bool = False) -> None:
        if found is None:
            return self.fail(case, tensor, 'ours has none')
        if found.shape != expected.shape:
            return self.fail(case, tensor, f'is {tuple(found.shape)}, expected '
                                           f'{tuple(expected.shape)}')
        found, expected = found.detach().double().cpu(), expected.double()
        error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        self.rows.append(Row(self.file, case, tensor, error, self.limits[gradient]))

    def compare_gradients(self, case: str, found: dict, expected: dict) -> None:
        """Of all parameters, by our names."""
        for name, gradient in expected.items():
            self.compare(case, f'gradient by {name}', found.pop(name, None), gradient, True)
        for name in found:
            self.fail(case, f'gradient by {name}', 'the case has none to compare with')

    def check_keys(self, case: str, content: dict, known: set[str], needed: set[str]) -> bool:
        for key in sorted(set(content) - known):
            self.fail(case, key, 'is not compared: unknown')
        for key in sorted(needed - set(content)):
            self.fail(case, key, 'is missing from the case')
        return needed <= set(content)


# --- VMamba ---------------------------------------------------------------------------------------

def vmamba_arch(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Our ``arch`` for the arguments of the official ``VSSM``."""
    choices = {'patchembed_version': {'v1': 'patch', 'v2': 'conv'},
               'downsample_version': {'v1': 'merge', 'v2': 'merge', 'v3': 'conv'}}
    stem, downsample = (table[kwargs[key]] for key, table in choices.items())
    arch = dict(embed_dims=kwargs['dims'], depths=tuple(kwargs['depths']),
                d_state=kwargs['ssm_d_state'], ssm_ratio=kwargs['ssm_ratio'],
                dt_rank=kwargs['ssm_dt_rank'], conv_bias=kwargs['ssm_conv_bias'],
                gate='noz' not in kwargs['forward_type'], mlp_ratio=kwargs['mlp_ratio'],
                stem=stem, downsample=downsample, scan='cross')
    if kwargs['ssm_act_layer'] != 'silu':
        arch['act'] = kwargs['ssm_act_layer']
    if kwargs['ssm_conv'] != 3:
        arch['conv_kernel'] = max(kwargs['ssm_conv'], 0)
    return arch


def check_vmamba(folder: Path, name: str, device, dtype, limits) -> Iterator[Row]:
    """A classifier and the same backbone with a norm for each output."""
    import torch

    numbers, described = folder / f'{name}.expected.pt', folder / f'{name}.json'
    if not numbers.is_file():
        yield Row(name, '', numbers.name, None, None, 'does not exist')
        return
    expected = torch.load(numbers, weights_only=True)
    kwargs, cases = expected['kwargs'], expected['cases']
    for kind, check in (('cls', _check_classifier), ('dense', _check_maps)):
        path = folder / f'{name}.{kind}.pth'
        found = Comparison(path.name, limits)
        missing = [p.name for p in (path, described) if not p.is_file()]
        if missing:
            found.fail('', missing[0], 'does not exist')
        elif json.loads(described.read_text())['arguments'] != kwargs:
            found.fail('', described.name, f'differs from the arguments in {name}.expected.pt')
        else:
            _guarded(found, lambda check=check, path=path, found=found: check(
                path, kwargs, cases, device, dtype, found))
        yield from found.rows


def _guarded(found: Comparison, check: Callable[[], None]) -> None:
    """A checkpoint that does not load, or arguments that build no model, are failures too."""
    try:
        check()
    except (RuntimeError, ValueError, KeyError, TypeError) as err:
        found.fail('', 'model', ' '.join(f'{type(err).__name__}: {err}'.split()))


def _backbone(kwargs, out_indices):
    from vmamba_mm.models import VMamba

    return VMamba(vmamba_arch(kwargs), out_indices=out_indices, in_channels=kwargs['in_chans'])


def _check_classifier(path, kwargs, cases, device, dtype, found):
    from torch import nn

    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.checkpoints.names import to_mm

    model = nn.ModuleDict(dict(backbone=_backbone(kwargs, (3,)), head=nn.ModuleDict(dict(
        fc=nn.Linear(8 * kwargs['dims'], kwargs['num_classes'])))))
    model.load_state_dict(read_checkpoint(path)['state_dict'])
    model.to(device, dtype).eval()
    known = {'input', 'logits', 'feats', 'grad_logits', 'grad_input', 'grad_params'}
    if not any('grad_params' in case for case in cases):
        found.fail('', 'grad_params', 'no case has gradients')
    for number, case in enumerate(cases):
        gradients = {'grad_logits', 'grad_input', 'grad_params'}
        needed = {'input', 'logits'} | (gradients if gradients & set(case) else set())
        if not found.check_keys(str(number), case, known, needed):
            continue
        image = case['input'].to(device, dtype).requires_grad_()
        logits = model['head']['fc'](model['backbone'](image)[0].mean((2, 3)))
        found.compare(str(number), 'logits', logits, case['logits'])
        if 'grad_logits' in case:
            model.zero_grad()
            logits.backward(case['grad_logits'].to(logits))
            found.compare(str(number), 'gradient by input', image.grad, case['grad_input'], True)
            found.compare_gradients(
                str(number), {k: p.grad for k, p in model.named_parameters()},
                {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) else v
                 for k, v in to_mm(case['grad_params']).items()})


def _check_maps(path, kwargs, cases, device, dtype, found):
    import torch

    model = _backbone(kwargs, (0, 1, 2, 3))
    model.load_pretrained(str(path))
    model.to(device, dtype).eval()
    for number, case in enumerate(cases):
        if not found.check_keys(str(number), case, set(case), {'input', 'feats'}):
            continue
        with torch.no_grad():
            maps = model(case['input'].to(device, dtype))
        if len(maps) != len(case['feats']):
            found.fail(str(number), 'feats', f'{len(case["feats"])} maps, ours has {len(maps)}')
        for i, (ours, theirs) in enumerate(zip(maps, case['feats'], strict=False)):
            found.compare(str(number), f'map {i}', ours, theirs)


def check_selective_scan(path: Path, device, limits) -> list[Row]:
    """Cases of the op, computed in fp64, against numbers that are stored in fp32 at least."""
    import torch

    from vmamba_mm.ops import selective_scan

    found = Comparison(path.name, limits)
    for number, case in enumerate(torch.load(path, weights_only=True)):
        if not found.check_keys(str(number), case, {'inputs', 'y', 'gy', 'grads'},
                                {'inputs', 'y', 'gy', 'grads'}):
            continue
        inputs = {k: v.to(device, torch.float64).requires_grad_()
                  for k, v in case['inputs'].items()}
        y = selective_scan(**inputs, delta_softplus=True)
        found.compare(str(number), 'y', y, case['y'])
        grads = torch.autograd.grad(y, list(inputs.values()), case['gy'].to(y))
        found.compare_gradients(str(number), dict(zip(inputs, grads, strict=True)), case['grads'])
    return found.rows


# --- folders --------------------------------------------------------------------------------------

def check_folder(folder: Path, device: str, dtype: str, only: list[str]) -> Iterator[Row]:
    """The rows of a folder: VMamba's files, which lie at the root of a set of folders."""
    import torch

    if not folder.is_dir():
        raise UserError(f'the folder {folder} does not exist')
    limits = LIMITS[torch.device(device).type, dtype]
    kind = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[dtype]
    names = sorted({p.name.removesuffix(suffix) for suffix in SUFFIXES
                    for p in folder.glob(f'*{suffix}')})
    scans = sorted(folder.glob('selective_scan.pt'))
    if not scans and not any(folder.glob('*.cls.pth')) and not any(folder.glob('*.dense.pth')):
        raise UserError(f'{folder} is of no system that is known: expected are NAME.cls.pth, '
                        'NAME.dense.pth and NAME.expected.pt of VMamba, or selective_scan.pt')
    for name in names:
        if not only or name in only:
            yield from check_vmamba(folder, name, device, kind, limits)
    for path in scans:
        if not only or path.stem in only:
            yield from check_selective_scan(path, device, LIMITS['cpu', 'fp32'])


def print_table(rows: list[Row]) -> None:
    """Failures and, of each file and case, the largest errors; the worst of all last."""
    width = max(len(row.tensor) for row in rows)
    files = max(len(row.file) for row in rows)
    print(f'{"file":<{files}}  case  {"tensor":<{width}}     error     limit')
    worst: dict[tuple, Row] = {}
    for row in rows:
        key = row.file, row.case, row.tensor.startswith('gradient')
        if row.error is not None and (key not in worst or not row.error <= worst[key].error):
            worst[key] = row
    for row in rows:
        if row.failed or row in worst.values():
            text = (row.problem or f'{row.error:9.1e} {row.limit:9.0e}'
                    + ('  FAILED' if row.failed else ''))
            print(f'{row.file:<{files}}  {row.case:<4}  {row.tensor:<{width}} {text}')


def main():
    args = parse_args()
    device = cli.choose_device(args.device)
    import torch

    # Of fp32 all bits are compared.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = [row for folder in args.folders
            for row in check_folder(folder, device, args.dtype, args.only)]
    if not rows:
        raise UserError(f'nothing is called {", ".join(args.only)} there')
    print_table(rows)
    failed = [row for row in rows if row.failed]
    measured = [row for row in rows if row.error is not None]
    if measured:
        most = max(measured, key=lambda row: row.error / row.limit)
        print(f'{len(rows)} comparisons, {len(failed)} failures; nearest to its limit: '
              f'{most.file}, case {most.case}, {most.tensor}: {most.error:.1e} of {most.limit:.0e}')
    if failed:
        raise UserError(f'{len(failed)} of {len(rows)} comparisons failed')


if __name__ == '__main__':
    cli.run(main)
