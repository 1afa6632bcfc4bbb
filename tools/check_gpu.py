"""Run every CUDA kernel, forward and backward, under NVIDIA's compute-sanitizer.

memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory
that nobody wrote. The logs are kept in work_dirs/check_gpu. Needs an NVIDIA GPU and
compute-sanitizer, which comes with the CUDA toolkit. A kernel of kernels/ that no case
launched fails the check.
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
  python tools/check_gpu.py --tools racecheck --jobs 1"""
TOOLS = ('memcheck', 'racecheck', 'initcheck')
LOGS = Path('work_dirs/check_gpu')
ERRORS = 99  # exit code of compute-sanitizer that found something
MARKS = {'launched': 'launched: ', 'absent': 'no kernel: ', 'done': 'all cases ran'}


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('--tools', nargs='+', choices=TOOLS, default=TOOLS)
    parser.add_argument('--jobs', type=int, default=len(TOOLS), metavar='N',
                        help='tools at once (default: all)')
    parser.add_argument('--only', default='', metavar='TEXT',
                        help='cases whose name has this; then kernels may be left out')
    parser.add_argument('--run-cases', choices=TOOLS, help=argparse.SUPPRESS)
    cli.add_traceback_option(parser)
    return parser.parse_args()


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

# name, arguments of ss2d_scan_inputs, dtype of x, whether with the norm
def scan_cases():
    import torch

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    return [
        ('one scan', (2, 20, 5, 9), {}, half, True),
        ('in spans', (1, 36, 20, 31), {'rank': 3}, half, True),
        ('around a cluster', (1, 36, 20, 31), {'rank': 3}, half, True),
        ('several images to a block', (530, 16, 7, 7), {}, half, True),
        ('odd channels, two routes', (2, 19, 6, 7), {'routes': 2, 'rank': 9}, half, False),
        ('one route', (2, 18, 3, 30), {'routes': 1}, brain, False),
        ('N = 4', (2, 20, 9, 10), {'state': 4}, half, True),
        ('N = 16', (1, 36, 18, 20), {'state': 16, 'rank': 6}, half, True),
        ('fp32', (2, 20, 9, 10), {}, single, True),
        ('fp32, N = 16', (1, 20, 20, 18), {'state': 16}, single, False)]


def run_cases(tool, only):
    """Each case forward and backward; names the kernels' files that were launched."""
    import torch

    from vmamba_mm.layers import BiMambaMixer, ConvStem, MambaBlock, RMSNorm, VSSBlock, run_blocks
    from vmamba_mm.models import RMT, VSSD, VisionRWKV, VMUNet
    from vmamba_mm.ops import (
        bi_wkv,
        causal_conv,
        mamba_inner,
        nc_ssd,
        selective_scan,
        ss2d_scan,
        ss2d_scan_norm,
        ssd,
        wkv,
    )
    from vmamba_mm.ops.core import gemm, launch
    from vmamba_mm.ops.nc_ssd import cuda as nc_ssd_kernels
    from vmamba_mm.ops.selective_scan import cuda_scan
    from vmamba_mm.ops.ss2d_scan import schedule
    from vmamba_mm.ops.ssd import cuda_launch as ssd_launch
    from vmamba_mm.ops.wkv import cuda_launch as wkv_launch
    from vmamba_mm.testing import (
        mamba_inner_inputs,
        selective_scan_inputs,
        ss2d_scan_inputs,
        ssd_inputs,
        with_grads,
    )

    if tool != 'memcheck':
        write_products_plainly(torch, gemm)
    launched, bind = set(), launch.Kernel.bind

    def recorded(self, *args, **fields):
        launched.add(self.instance.source)
        return bind(self, *args, **fields)

    launch.Kernel.bind = recorded

    def run(name, op, inputs, **kwargs):
        if only not in f'{op.__name__}, {name}':
            return
        inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
        try:
            with torch.no_grad():
                y = op(**inputs, **kwargs, backend='cuda')
        except ValueError as err:
            print(f'{MARKS["absent"]}{op.__name__}, {name}: {err}', flush=True)
            return
        with_grads(op, inputs, torch.ones(y.shape).cuda(), **kwargs, backend='cuda')
        torch.cuda.synchronize()
        print(f'{time.monotonic() - began:.0f} s: {op.__name__}, {name}', flush=True)

    def run_block(name, dtype):
        """The step-by-step path, which a hook chooses, and the whole as one op."""
        if only not in f'block, {name}':
            return
        torch.manual_seed(0)
        block = VSSBlock(36, mlp_ratio=2.0, drop_path=0.5, with_cp=False,
                         ssm_cfg={'ssm_ratio': 2.0, 'conv_bias': True}).cuda()
        for hook in (None, lambda *args: None):
            if hook is not None:
                block.mlp.register_forward_hook(hook)
            x = torch.randn(3, 5, 9, 36, device='cuda', requires_grad=True)
            with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                block(x).float().sum().backward()
                with torch.no_grad():
                    block(x)
        torch.cuda.synchronize()
        print(f'{time.monotonic() - began:.0f} s: block, {name}', flush=True)

    def run_mamba_blocks(name, dtype):
        """As one op each, and in inference as one op together."""
        if only not in f'Mamba blocks, {name}':
            return
        torch.manual_seed(0)
        blocks = [MambaBlock(BiMambaMixer(40, dt_rank=3), RMSNorm(40)).cuda() for _ in range(2)]
        x = torch.randn(2, 37, 40, device='cuda', requires_grad=True)
        with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
            sum(run_blocks(blocks, x)).float().sum().backward()
            with torch.no_grad():
                run_blocks(blocks, x)
        torch.cuda.synchronize()
        print(f'{time.monotonic() - began:.0f} s: Mamba blocks, {name}', flush=True)

    def run_model(name, model, *size):
        """Training and inference, of which some parts are other kernels, in all dtypes."""
        if only not in f'model, {name}':
            return
        model = model.cuda()
        x = torch.randn(2, 3, *size, device='cuda')
        for dtype in (torch.float16, torch.float32):
            with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                sum(y.float().sum() for y in model.train()(x)).backward()
                with torch.no_grad():
                    model.eval()(x)
        torch.cuda.synchronize()
        print(f'{time.monotonic() - began:.0f} s: model, {name}', flush=True)

    def run_stem():
        if only not in 'stem':
            return
        with torch.no_grad(), torch.autocast('cuda', torch.float16):
            ConvStem(3, 96).cuda()(torch.randn(2, 3, 19, 37, device='cuda'))
        torch.cuda.synchronize()
        print(f'{time.monotonic() - began:.0f} s: stem', flush=True)

    began, clusters = time.monotonic(), schedule.cluster_schedules
    for name, shape, kwargs, dtype, norm in scan_cases():
        # Spans would be gone around too, where the GPU has clusters.
        schedule.cluster_schedules = (lambda *args: ()) if name == 'in spans' else clusters
        launch.forget()
        inputs = ss2d_scan_inputs(*shape, **kwargs)
        inputs['x'] = inputs['x'].to(dtype)
        run(name, ss2d_scan, inputs)
        if norm:
            weight = torch.ones(shape[1])
            run(name, ss2d_scan_norm, dict(inputs, norm_weight=weight, norm_bias=weight))
    for state, dtype, length in ((1, torch.float32, 150), (16, torch.float16, 151),
                                 (16, torch.float16, 152), (40, torch.float32, 40)):
        inputs = selective_scan_inputs(2, 2, 9, length, state, dtype=dtype)
        inputs |= dict(z=inputs['u'].clone(), initial_state=torch.ones(2, 18, state))
        for cuda_scan.max_span in (None, 32):
            launch.forget()
            run(f'N = {state}, L = {length}, spans of {cuda_scan.max_span}', selective_scan, inputs,
                delta_softplus=True, reverse=length % 2 > 0)
    cuda_scan.max_span = None
    launch.forget()
    for taps, dtype, dim in ((4, torch.float16, 20), (3, torch.float32, 7)):
        x, weight = torch.randn(2, 37, dim).to(dtype), torch.randn(dim, taps)
        inputs = dict(x=x, weight=weight, bias=weight[:, 0].clone(),
                      initial_state=x[:, :taps - 1].clone())
        run(f'{taps} taps', causal_conv, inputs)
        run(f'{taps} taps, channels first', causal_conv, inputs | dict(
            x=x.transpose(1, 2).contiguous().transpose(1, 2)), reverse=True)
    for routes, dtype, dim in ((2, torch.float16, 72), (1, torch.float32, 6)):
        inputs = mamba_inner_inputs(2, routes, dim, 37, 16, 3)
        run(f'{routes} directions', mamba_inner, inputs | dict(xz=inputs['xz'].to(dtype)))
    for shape, dtype in (((2, 150, 4, 40, 2, 24), torch.bfloat16),
                         ((1, 300, 2, 64, 1, 128), torch.float16),
                         ((1, 70, 2, 16, 1, 16), torch.float32)):
        inputs = ssd_inputs(*shape, dtype=dtype)
        inputs |= dict(z=inputs['x'].clone(), initial_state=torch.ones(*shape[:1], *shape[2:4],
                                                                       shape[5]))
        for ssd_launch.max_span in (None, 1):
            launch.forget()
            run(f'{shape}, spans of {ssd_launch.max_span}', ssd, inputs, dt_softplus=True,
                reverse=shape[1] == 150)
    ssd_launch.max_span = None
    for shape, dtype in (((2, 150, 4, 40, 1, 48), torch.bfloat16),
                         ((1, 300, 6, 24, 3, 64), torch.float16),
                         ((1, 70, 2, 16, 1, 128), torch.float32)):
        inputs = ssd_inputs(*shape, dtype=dtype)
        for nc_ssd_kernels.force_spans in (None, 1, 2):
            launch.forget()
            run(f'{shape}, {nc_ssd_kernels.force_spans} spans', nc_ssd, inputs, dt_softplus=True)
    nc_ssd_kernels.force_spans = None
    launch.forget()
    for length, dtype in ((61, torch.float16), (200, torch.float32)):
        k, v = torch.randn(2, 2, length, 40).to(dtype)
        inputs = dict(w=torch.randn(40), u=torch.randn(40), k=k, v=v)
        for wkv_launch.max_warps in (None, 2):
            launch.forget()
            where = f'L = {length}, {wkv_launch.max_warps} warps'
            run(where, wkv, inputs | dict(state=torch.ones(2, 3, 40)))
            for mode in ('paper', 'official'):
                run(f'{mode}, {where}', bi_wkv, inputs | dict(w=inputs['w'] / length), mode=mode)
            run(f'strong decays, {where}', bi_wkv, inputs | dict(w=inputs['w'] + 9))
    wkv_launch.max_warps = None
    launch.forget()
    for name, dtype in (('half', torch.float16), ('fp32', torch.float32)):
        run_block(name, dtype)
        run_mamba_blocks(name, dtype)
    run_stem()
    run_model('RMT', RMT(dict(
        embed_dims=(32, 32, 64, 32), depths=(1, 1, 1, 1), num_heads=(2, 1, 2, 2),
        mlp_ratios=(2, 2, 2, 2), layer_scales=(0.5, 0, 0, 0))), 72, 56)
    run_model('Vision-RWKV', VisionRWKV(dict(
        embed_dims=48, depth=2, patch_size=4, image_size=16, formula='official', post_norm=True,
        layer_scale=0.5)), 40, 20)
    run_model('VSSD', VSSD(dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8),
                                d_state=8)), 40, 36)
    run_model('VM-UNet', VMUNet(dict(embed_dims=48, depths=(1, 2), decoder_depths=(2, 1),
                                     d_state=16)), 40, 20)
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

def start(sanitizer, tool, only):
    command = [sanitizer, '--tool', tool, '--error-exitcode', str(ERRORS), '--print-limit', '20']
    if tool == 'memcheck':
        # cuda.bindings asks the driver for functions that it may lack, which counts as an error of
        # the API. Our own calls raise on theirs.
        command += ['--report-api-errors', 'no']
    if tool == 'racecheck':  # torch's kernels are not checked; initcheck must see their writes
        command += ['--kernel-name-exclude', 'kns=at6native']
    command += [sys.executable, __file__, '--run-cases', tool, '--only', only, '--traceback']
    # Every tensor in an allocation of its own, so that its end and its first write are known.
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING='1', PYTHONUNBUFFERED='1')
    with open(LOGS / f'{tool}.log', 'w') as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def find_problem(log, code, sources):
    """Say what is wrong in a tool's log, or None."""
    if code == ERRORS or code == 0 and MARKS['done'] not in log:
        said = re.findall(r'^=+ ((?:.*error|.*race|.* SUMMARY):? .*)', log, re.I | re.M)
        return '; '.join(dict.fromkeys(said[:1] + said[-1:])) or f'exit code {code}'
    if code:
        return f'the cases failed with exit code {code}: {log.strip().splitlines()[-1]}'
    launched = re.search(f'{MARKS["launched"]}(.*)', log)[1].split()
    missing = sorted(sources - set(launched))
    return f'never launched: {", ".join(missing)}' if missing else None


def main():
    args = parse_args()
    if args.run_cases:
        run_cases(args.run_cases, args.only)
        return
    sanitizer = find_sanitizer()
    import torch

    from vmamba_mm.paths import KERNELS

    if torch.version.hip is not None or not torch.cuda.is_available():
        raise UserError('torch finds no NVIDIA GPU here')
    LOGS.mkdir(parents=True, exist_ok=True)
    sources = set()
    if not args.only:
        sources = {path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob('*.cu')}
    failed, waiting, running, began = [], list(args.tools), {}, {}
    while waiting or running:
        while waiting and len(running) < max(1, args.jobs):
            tool = waiting.pop(0)
            running[tool], began[tool] = start(sanitizer, tool, args.only), time.monotonic()
        time.sleep(0.2)
        for tool in [tool for tool, process in running.items() if process.poll() is not None]:
            log = (LOGS / f'{tool}.log').read_text()
            problem = find_problem(log, running.pop(tool).returncode, sources)
            print(f'{tool:10} {"FAILED: " + problem if problem else "passed"} '
                  f'({time.monotonic() - began[tool]:.0f} s)', flush=True)
            if problem:
                failed.append(tool)
    absent = [line for line in log.splitlines() if line.startswith(MARKS['absent'])]
    print('\n'.join(absent))
    if failed:
        raise UserError(f'{", ".join(failed)} found something: see {LOGS}/*.log')
    what = f'cases with {args.only!r}' if args.only else f'{len(sources)} files of kernels'
    print(f'{what} under {", ".join(args.tools)}: clean')


if __name__ == '__main__':
    cli.run(main)
