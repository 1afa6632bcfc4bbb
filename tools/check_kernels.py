"""Compile every CUDA kernel for every GPU generation; check registers, spills and stack frames.

Needs NVRTC, which comes with CUDA builds of torch, and no GPU. kernels/resources.json holds what
each kernel may use.
"""

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.ops.core import compile, instances

EXAMPLES = """\
  python tools/check_kernels.py
  python tools/check_kernels.py --only ss2d_scan_fwd --arch 90
  python tools/check_kernels.py --update"""
ARCHS = (75, 80, 86, 89, 90, 100, 120)
BUDGET = compile.KERNELS / 'resources.json'
VERBOSE = '--ptxas-options=-v'


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--only', default='', metavar='TEXT',
                        help='kernels whose file, name or defines contain this')
    parser.add_argument('--arch', type=int, nargs='+', default=ARCHS, metavar='N',
                        help=f'compute capabilities (default: {" ".join(map(str, ARCHS))})')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), metavar='N',
                        help='compilers at once (default: the number of cores)')
    parser.add_argument('--update', action='store_true',
                        help=f'write what the kernels use today to kernels/{BUDGET.name}')
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    if args.update and (args.only or args.arch != ARCHS):
        parser.error('--update takes all kernels and GPUs: leave out --only and --arch')
    return args


def measure(instance, arch):
    """Registers and bytes a thread, shared bytes a block; or the text of an error."""
    verbose = instance._replace(options=(*instance.options, VERBOSE))
    try:
        return parse_log(compile.build(verbose, f'sm_{arch}'))
    except (OSError, RuntimeError, ValueError) as err:
        return str(err)


def parse_log(binary):
    """Parse what ptxas says of a kernel and of the functions that it calls.

    Other kernels of the same file, compiled along, do not count.
    """
    sections = {symbol: text for symbol, text in re.findall(
        r"Compiling entry function '(\S+)' for(.*?)(?=Compiling entry function|\Z)", binary.log,
        re.DOTALL)}
    used = re.search(r'Used (\d+) registers(.*)', sections.get(binary.symbol, ''))
    if not used:
        raise RuntimeError(f'NVRTC does not say what {binary.symbol} uses: {binary.log!r}')
    functions = [tuple(map(int, numbers)) for name, *numbers in re.findall(
        r'Function properties for (\S+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, '
        r'(\d+) bytes spill loads', binary.log) if name == binary.symbol or name not in sections]
    shared = re.search(r'(\d+) bytes smem', used[2])
    return dict(registers=int(used[1]), stack=sum(n[0] for n in functions),
                spill=sum(n[1] + n[2] for n in functions), shared=int(shared[1]) if shared else 0)


def find_problems(uses_of, budget):
    """A line for each use that is an error, a spill, or above the budget.

    Registers are handed out to threads by eights. Below that NVRTC is not to be held to a number:
    the same kernel compiled twice by one release can differ by three.
    """
    for name, by_arch in uses_of.items():
        for arch, use in by_arch.items():
            allowed = budget.get(name, {}).get(arch)
            if isinstance(use, str):
                yield f'{name}, {arch}: {use}'
                continue
            if use['spill']:
                yield f'{name}, {arch}: {use["spill"]} bytes of spill stores and loads'
            if allowed is None:
                yield f'{name}, {arch}: not in {BUDGET.name}'
                continue
            limits = dict(registers=-(-allowed['registers'] // 8) * 8, stack=allowed['stack'])
            yield from (f'{name}, {arch}: {what} {use[what]}, allowed {limit}'
                        for what, limit in limits.items() if use[what] > limit)


def print_table(uses_of, archs):
    width = max(map(len, uses_of))
    print(f'{"registers":<{width}}' + ''.join(f'{arch:>8}' for arch in archs) + '  shared')
    for name, by_arch in uses_of.items():
        uses = [by_arch.get(arch) for arch in archs]
        cells = ['-' if u is None else 'error' if isinstance(u, str) else u['registers']
                 for u in uses]
        shared = max((u['shared'] for u in uses if isinstance(u, dict)), default=0)
        print(f'{name:<{width}}' + ''.join(f'{cell:>8}' for cell in cells) + f'{shared:>8}')


def dump(version, uses_of):
    """JSON with a line for each kernel and GPU, so that a change shows as one line."""
    kernels = ',\n'.join(
        f'  {json.dumps(name)}: {{\n' + ',\n'.join(
            f'   {json.dumps(arch)}: ' + json.dumps({k: use[k] for k in use if k != 'spill'})
            for arch, use in by_arch.items()) + '\n  }' for name, by_arch in uses_of.items())
    return f'{{\n "nvrtc": "{version}",\n "kernels": {{\n{kernels}\n }}\n}}\n'


def main():
    args = parse_args()
    try:
        version = '{}.{}'.format(*compile.find_nvrtc().version)
    except compile.NvrtcNotFound as err:
        raise UserError(str(err)) from err
    jobs = [(instance, arch) for instance, lowest in instances.INSTANCES.items()
            for arch in args.arch if arch >= lowest and instance.only in (0, arch)
            and args.only in str(instance)]
    if not jobs:
        what = 'no kernel fits' if instances.INSTANCES else 'there are no kernels yet'
        print(f'{what}; NVRTC {version}')
        return
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['vmamba_mm.ops.core.compile'])
    uses_of = {}
    with ProcessPoolExecutor(min(args.jobs, len(jobs)), mp_context=context) as pool:
        for (instance, arch), use in zip(jobs, pool.map(measure, *zip(*jobs, strict=True)),
                                         strict=True):
            uses_of.setdefault(str(instance), {})[f'sm_{arch}'] = use
    print_table(uses_of, [f'sm_{arch}' for arch in args.arch])
    broken = any(isinstance(use, str) for by_arch in uses_of.values() for use in by_arch.values())
    if args.update and not broken:
        write_atomic(dump(version, uses_of).encode(), BUDGET)
        print(f'wrote {BUDGET.name}')
    recorded = json.loads(Path(BUDGET).read_text())
    problems = list(find_problems(uses_of, recorded['kernels']))
    if not args.only and (stale := recorded['kernels'].keys() - uses_of.keys()):
        problems.append(f'{BUDGET.name} has kernels that are gone: {", ".join(sorted(stale))}')
    if problems:
        print('\n'.join(problems))
        raise UserError(f'{len(problems)} problem(s) with NVRTC {version}, the budget is of '
                        f'{recorded["nvrtc"]}; if intended: '
                        'python tools/check_kernels.py --update')
    print(f'{len(jobs)} compilations, no spills, within kernels/{BUDGET.name}; NVRTC {version}')


if __name__ == '__main__':
    cli.run(main)
