"""Run every CUDA kernel, forward and backward, under NVIDIA's compute-sanitizer.

memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory
that nobody wrote, synccheck barriers that not all threads reach. The logs are kept in
work_dirs/check_gpu. Needs an NVIDIA GPU and compute-sanitizer, which comes with the CUDA toolkit;
the cases of whole models need mmengine too. A kernel that no case launched, of those that the cases
are for, fails the check; together they are for all of kernels/.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/check_gpu.py
  python tools/check_gpu.py --tools memcheck --only ssd wkv
  python tools/check_gpu.py --tools racecheck --leave-out model --jobs 1"""
TOOLS = ('memcheck', 'racecheck', 'initcheck', 'synccheck')
LOGS = Path('work_dirs/check_gpu')
ERRORS = 99  # exit code of compute-sanitizer that found something
MARKS = {'launched': 'launched: ', 'absent': 'no kernel: ', 'done': 'all cases ran'}


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--tools', nargs='+', choices=TOOLS, default=TOOLS[:3],
                        help='default: all but synccheck')
    parser.add_argument('--jobs', type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)),
                        metavar='N', help='processes at once, to which the cases of the tools are '
                        'dealt out; kernels that are not on disk yet are compiled in them '
                        '(default: one for two cores, at most 8)')
    parser.add_argument('--only', nargs='+', default=[''], metavar='TEXT',
                        help='cases whose name has one of these; --list shows them')
    parser.add_argument('--leave-out', nargs='+', default=[], metavar='TEXT',
                        help='no cases whose name has one of these')
    parser.add_argument('--list', action='store_true', help='print the names of the cases')
    parser.add_argument('--run-cases', choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument('--part', nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    cli.add_traceback_option(parser)
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    return args


def choose(cases, only, leave_out):
    """The cases by --only and --leave-out, in their order."""
    chosen = [case for case in cases if any(text in case.name for text in only)
              and not any(text in case.name for text in leave_out)]
    if not chosen:
        raise UserError(f'no case has one of {only} in its name and none of {leave_out}; --list '
                        'shows the names')
    return chosen


def find_sanitizer():
    homes = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), '/usr/local/cuda']
    sanitizer = shutil.which('compute-sanitizer')
    for path in (Path(home, 'bin', 'compute-sanitizer') for home in homes if home):
        sanitizer = sanitizer or (str(path) if path.is_file() else None)
    if sanitizer is None:
        raise UserError(
            'compute-sanitizer was not found on PATH, in CUDA_HOME, CUDA_PATH or /usr/local/cuda: '
            "it comes with NVIDIA's CUDA toolkit (package cuda-sanitizer)")
    return sanitizer


# --- the process that is checked ------------------------------------------------------------

def run_cases(tool, cases):
    """Run them one after the other, and print which files of kernels they launched."""
    import torch

    from vmamba_mm.ops.core import gemm, launch

    if tool != 'memcheck':
        write_products_plainly(torch, gemm)
    launched, bind, began = set(), launch.Kernel.bind, time.monotonic()

    def recorded(self, *args, **fields):
        launched.add(self.instance.source)
        return bind(self, *args, **fields)

    launch.Kernel.bind = recorded
    for case in cases:
        launch.forget()
        torch.manual_seed(0)
        try:
            case.run('cuda')
            torch.cuda.synchronize()
        except ValueError as err:
            if 'does not take these inputs' not in str(err):
                raise
            print(f'{MARKS["absent"]}{case.name}: {err}', flush=True)
            continue
        print(f'{time.monotonic() - began:.0f} s: {case.name}', flush=True)
    print(f'{MARKS["launched"]}{" ".join(sorted(launched))}\n{MARKS["done"]}')


def write_products_plainly(torch, gemm):
    """Matrix products by sums in place of cuBLAS, which the tools do not understand.

    initcheck does not see all that it writes, racecheck reports races in its kernels for Hopper,
    and fails with an internal error where these are excluded by name.
    """
    library = torch.library.Library('aten', 'IMPL')

    def product(a, b):
        step = max(1, 2**24 // max(1, a.shape[-1] * b.shape[-1]))
        rows = [(part.float()[..., None] * b.float()[..., None, :, :]).sum(-2)
                for part in a.split(step, dim=-2)]
        return torch.cat(rows, dim=-2).to(a.dtype)

    def scaled(bias, a, b, beta=1, alpha=1):
        return (beta * bias + alpha * product(a, b)).to(a.dtype)

    for name in ('mm', 'bmm'):
        library.impl(name, product, 'CUDA')
        library.impl(f'{name}.out', lambda a, b, out: out.copy_(product(a, b)), 'CUDA')
    for name in ('addmm', 'baddbmm'):
        library.impl(name, lambda bias, a, b, *, beta=1, alpha=1: scaled(bias, a, b, beta, alpha),
                     'CUDA')
        library.impl(f'{name}.out', lambda bias, a, b, *, beta=1, alpha=1, out:
                     out.copy_(scaled(bias, a, b, beta, alpha)), 'CUDA')
    write_products_plainly.library = library  # it holds as long as this lives

    class Memory:
        def __init__(self, address, size, dtype):
            self.__cuda_array_interface__ = dict(
                data=(address, False), shape=(size,), typestr=f'<i{dtype.itemsize}', version=3)

    def on_addresses(index, dtype, out_dtype, rows, columns, inner, left_t=False, right_t=False,
                     bias=False, tf32=False, pitches=(0, 0, 0), batch=1):
        def matrices(address, height, width, dtype, pitch=0):
            pitch = pitch or width
            size = (batch * height - 1) * pitch + width
            memory = torch.as_tensor(Memory(address, size, dtype), device='cuda').view(dtype)
            return memory.as_strided((batch, height, width), (height * pitch, pitch, 1))

        def run(left, right, out, workspace, *bias):
            a = (matrices(left, inner, rows, dtype, pitches[0]).mT if left_t
                 else matrices(left, rows, inner, dtype, pitches[0]))
            b = (matrices(right, columns, inner, dtype, pitches[1]).mT if right_t
                 else matrices(right, inner, columns, dtype, pitches[1]))
            result = product(a, b)
            if bias:
                result += matrices(*bias, 1, columns, dtype)
            matrices(out, rows, columns, out_dtype, pitches[2]).copy_(result)

        return gemm.Product(run, 0)

    gemm.product = on_addresses


# --- the tools ------------------------------------------------------------------------------

def start(sanitizer, tool, part, parts, args):
    command = [sanitizer, '--tool', tool, '--error-exitcode', str(ERRORS), '--print-limit', '20']
    if tool == 'memcheck':
        # cuda.bindings asks the driver for functions that it may lack, which counts as an error of
        # the API. Our own calls raise on theirs.
        command += ['--report-api-errors', 'no']
    if tool == 'racecheck':  # torch's kernels are not checked; initcheck must see their writes
        command += ['--kernel-name-exclude', 'kns=at6native']
    command += [sys.executable, __file__, '--run-cases', tool, '--part', str(part), str(parts),
                '--only', *args.only]
    if args.leave_out:
        command += ['--leave-out', *args.leave_out]
    # Every tensor in an allocation of its own, so that its end and its first write are known.
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING='1', PYTHONUNBUFFERED='1',
               VMAMBA_TRACEBACK='1')
    with open(log_of(tool, part), 'w') as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def log_of(tool, part):
    return LOGS / f'{tool}-{part}.log'


def find_problem(log, code):
    """Say what is wrong in a process's log, or None."""
    if code == ERRORS or code == 0 and MARKS['done'] not in log:
        said = re.findall(r'^=+ ((?:.*error|.*race|.* SUMMARY):? .*)', log, re.I | re.M)
        return '; '.join(dict.fromkeys(said[:1] + said[-1:])) or f'exit code {code}'
    if code:
        return f'the cases failed with exit code {code}: {log.strip().splitlines()[-1]}'
    return None


def find_missing(cases, logs):
    """The files that none of a tool's processes launched, but those of which no case has a kernel
    on this GPU."""
    said = '\n'.join(logs)
    absent = {name for name, _ in absences(said)}
    launched = {file for files in re.findall(f'^{MARKS["launched"]}(.*)', said, re.M)
                for file in files.split()}
    return sorted({file for case in cases if case.name not in absent
                   for file in case.launches} - launched)


def absences(log):
    """(name, reason) of the cases that have no kernel on this GPU."""
    return re.findall(f'^{MARKS["absent"]}(.*?): (backend=.*)', log, re.M)


def main():
    args = parse_args()
    import _gpu_cases

    cases = choose(_gpu_cases.all_cases(), args.only, args.leave_out)
    if args.list:
        print('\n'.join(case.name for case in cases))
        return
    if args.run_cases:
        part, parts = args.part
        run_cases(args.run_cases, cases[part::parts])
        return
    sanitizer = find_sanitizer()
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        raise UserError('torch finds no NVIDIA GPU here')
    LOGS.mkdir(parents=True, exist_ok=True)
    parts = min(len(cases), max(1, args.jobs // len(args.tools)))
    waiting = [(tool, part) for tool in args.tools for part in range(parts)]
    failed, running, began = set(), {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop(0)
            running[job] = start(sanitizer, *job, parts, args)
        time.sleep(0.2)
        for job in [job for job, process in running.items() if process.poll() is not None]:
            problem = find_problem(log_of(*job).read_text(), running.pop(job).returncode)
            print(f'{job[0]:10} {job[1] + 1} of {parts}: '
                  f'{"FAILED: " + problem if problem else "passed"} '
                  f'({time.monotonic() - began:.0f} s)', flush=True)
            if problem:
                failed.add(job[0])
    for tool in args.tools:
        logs = [log_of(tool, part).read_text() for part in range(parts)]
        missing = [] if tool in failed else find_missing(cases, logs)
        if missing:
            print(f'{tool:10} FAILED: never launched: {", ".join(missing)}')
            failed.add(tool)
    for name, reason in absences('\n'.join(logs)):
        print(f'{name} has no kernel here: {reason}')
    if failed:
        raise UserError(f'{", ".join(sorted(failed))} found something: see {LOGS}/*.log')
    print(f'{len(cases)} cases under {", ".join(args.tools)}: clean')


if __name__ == '__main__':
    cli.run(main)
