"""Compare our models with numbers of the official code: outputs and every gradient.

A folder has the name of a system, such as parity/vmamba, and holds for each model the arguments of
the official constructor (NAME.json), the official checkpoint (NAME.pth), and cases with inputs,
outputs and gradients that the official code gave on a CPU (NAME.expected.pt); op_NAME.pt and
others hold cases of an op or a layer. The folder that such folders lie in is VMamba's, with
NAME.cls.pth and NAME.dense.pth.
Errors are relative 2-norms; the worst come last. What is above its limit, missing, not compared or
unknown is a failure, and the exit code is then 1. In half precision on a GPU an error may be twice
that of plain PyTorch, the same model without our kernels on inputs rounded one way or the other,
where that is more than the limit.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/check_parity.py ../shared/parity
  python tools/check_parity.py ../shared/parity --only s1 vanilla --device cuda
  python tools/check_parity.py ../shared/parity --dtype bf16"""

EXPECTED = '.expected.pt'
#: The family of the folder that the others' folders lie in.
ROOT = 'vmamba'


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('folders', metavar='FOLDER', nargs='+', type=Path)
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    parser.add_argument('--dtype', choices=('fp32', 'fp16', 'bf16'),
                        help='of models, ops and inputs (default: fp32, on a CPU fp64 of ops)')
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME',
                        help='the files of these names alone, such as s1 or op_ssd')
    cli.add_traceback_option(parser)
    return parser.parse_args()


def find_parity(folder: Path):
    """The family that a folder is of, and its ``Parity`` for it, by the folder's name; the root is
    VMamba's, by its files.

    Raises:
        UserError: if there is none.
    """
    from vmamba_mm.families import FAMILIES

    if not folder.is_dir():
        raise UserError(f'the folder {folder} does not exist')
    parities = {f.system or f.name: (f, f.parity) for f in FAMILIES.values()
                if f.parity is not None}
    parities |= {name: (f, parity) for f in FAMILIES.values()
                 for name, parity in f.parity_folders.items()}
    name, root = folder.resolve().name, FAMILIES[ROOT]
    of_root = [*(f'*{end}' for end in root.parity.checkpoints[:1]), *root.parity.ops]
    if name not in parities and any(any(folder.glob(pattern)) for pattern in of_root):
        return root, root.parity
    if name not in parities:
        raise UserError(f'{folder}: there is no family {name!r} to compare, only '
                        f'{", ".join(parities)}; the folder has the name of the family')
    return parities[name]


def check_folder(folder: Path, device: str = 'cpu', dtype: str | None = None,
                 only: list[str] | tuple[str, ...] = ()) -> Iterator['Row']:  # noqa: F821
    """The rows of a folder.

    Args:
        folder: of a family, or VMamba's.
        device: of torch.
        dtype: 'fp32', 'fp16' or 'bf16'; None for fp32, and on a CPU fp64 of ops and of models whose
            family asks for it.
        only: names of files without their ends; none for all.
    """
    from _parity.report import Row
    from _parity.runner import Runner

    family, parity = find_parity(folder)
    runner = Runner(family, parity, device,
                    dtype or (parity.models_in if device == 'cpu' else 'fp32'),
                    dtype or ('fp64' if device == 'cpu' else 'fp32'))
    ends = (*parity.checkpoints, EXPECTED, '.json')
    names = {p.name.removesuffix(end) for end in ends for p in folder.glob(f'*{end}')}
    ops = [p for p in sorted(folder.glob('*.pt')) if not p.name.endswith(EXPECTED)]
    if not names and not ops:
        raise UserError(f'{folder} holds no NAME.json and no NAME.pt')
    for name in sorted(names):
        if not only or name in only:
            yield from check_name(runner, folder, name)
    for path in ops:
        if not only or path.stem in only:
            yield from runner.check_op(path)
    for path in sorted(folder.glob('*.pth')):
        if not path.name.endswith(parity.checkpoints) and not only:
            yield Row(path.name, '', '', problem='belongs to no NAME.json')


def check_name(runner, folder: Path, name: str) -> Iterator['Row']:  # noqa: F821
    """The rows of all checkpoints of one name."""
    from _parity.report import Report

    paths = [folder / f'{name}{suffix}' for suffix in runner.parity.checkpoints]
    report = Report(name, runner.parity, runner.device, runner.dtype)
    arguments, expected = {}, {}
    with report.catch('', f'{name}.json'):
        arguments = read_json(folder / f'{name}.json')
    with report.catch('', f'{name}{EXPECTED}'):
        expected = read_expected(folder / f'{name}{EXPECTED}', report)
    for path in paths:
        if not path.is_file():
            report.fail('', path.name, 'does not exist')
    for key in sorted(set(arguments) & set(expected) - {'note'}):
        if _comparable(arguments[key]) != _comparable(expected[key]):
            report.fail('', f'{name}.json', f'{key} differs from that in {name}{EXPECTED}')
    yield from report.rows
    if not any(row.failed for row in report.rows):
        for path in paths:
            yield from runner.check_model(path, arguments, expected)


def read_json(path: Path) -> dict:
    """The options of a model; VMamba's files say 'arguments' for 'kwargs'."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as err:
        raise UserError(f'cannot be read: {err}') from err
    if not isinstance(content, dict):
        raise UserError(f'holds a {type(content).__name__}, not a dict of options')
    if 'arguments' in content:
        content['kwargs'] = content.pop('arguments')
    return content


def read_expected(path: Path, report) -> dict:
    """Read the numbers that a model is compared with; none where there is no file."""
    from _parity.runner import read_numbers

    if not path.is_file():
        report.lack('', path.name, 'does not exist')
        return {}
    content = read_numbers(path)
    if not isinstance(content, dict):
        raise UserError(f'holds a {type(content).__name__}, not a dict of cases')
    return content


def _comparable(value):
    """The value as JSON would give it back: lists for tuples, str for keys."""
    if isinstance(value, Mapping):
        return {str(k): _comparable(v) for k, v in value.items()}
    return [_comparable(v) for v in value] if isinstance(value, list | tuple) else value


def print_table(rows: list) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        text = '  '.join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        if row.is_omitted:
            print(f'{text}  not compared: {row.reason}')
        elif row.problem:
            print(f'{text}  FAILED: {row.problem}')
        else:
            print(f'{text}  {row.error:9.1e} {row.limit:9.0e}' + ('  FAILED' if row.failed else '')
                  + (f'  ({row.reason})' if row.reason else ''))


def main():
    args = parse_args()
    device = cli.choose_device(args.device)
    import torch
    from _parity.report import TWICE

    # Of fp32 all bits are compared.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for folder in args.folders:
        # Files of several families may have one name.
        place = f'{folder.name}/' if len(args.folders) > 1 else ''
        rows += [row._replace(file=place + row.file)
                 for row in check_folder(folder, device, args.dtype, args.only)]
    if not rows:
        raise UserError(f'nothing is called {", ".join(args.only)} there')
    # What is omitted and why comes first, the worst error last.
    rows.sort(key=lambda row: row.excess)
    print_table(rows)
    failed = [row for row in rows if row.failed]
    compared = [row for row in rows if row.error is not None and math.isfinite(row.excess)]
    if compared:
        worst, twice = compared[-1], sum(row.reason == TWICE for row in rows)
        print(f'{len(compared)} comparisons, {len(failed)} failures'
              + (f' ({twice} limits are {TWICE})' if twice else '') + '; nearest to its limit: '
              f'{worst.file}, case {worst.case}, {worst.tensor}: {worst.error:.1e} of '
              f'{worst.limit:.0e}')
    if failed:
        raise UserError(f'{len(failed)} of {len(rows)} rows failed')


if __name__ == '__main__':
    cli.run(main)
