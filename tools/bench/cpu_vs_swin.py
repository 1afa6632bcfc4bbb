"""VMamba-T against timm's Swin-T on a CPU: images/s and peak memory, in one run, fp32.

Checks the op against its reference first; a wrong result ends the run before any timing. Models
take turns, so that a machine whose speed drifts is fair to both; the median round counts. Peak
memory is the resident set of a fresh process above what it held before the model was built.

Example: python tools/bench/cpu_vs_swin.py --batch 8 --size 224 --threads 2
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import timm
import torch

import vmamba_mm
from vmamba_mm.mm.measuring import cpu_name
from vmamba_mm.models import VMamba
from vmamba_mm.ops import ss2d_scan
from vmamba_mm.testing import relative_error, ss2d_scan_inputs, with_grads

PEER = 'swin_tiny_patch4_window7_224'
MODES = ('inference', 'forward+backward')


def build(name: str, size: int) -> torch.nn.Module:
    if name == PEER:
        return timm.create_model(name, num_classes=0, img_size=size)
    return VMamba(name, out_indices=(3,))


def run(model: torch.nn.Module, images: torch.Tensor, mode: str) -> None:
    if mode == 'inference':
        model.eval()
        with torch.inference_mode():
            model(images)
    else:
        model.train()
        out = model(images)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        model.zero_grad(set_to_none=True)


def verify() -> None:
    """The op that runs against the specification, fp32, at the shapes of the four stages."""
    worst = 0.0
    for dim, side in ((96, 14), (192, 14), (384, 14), (768, 7)):
        inputs = ss2d_scan_inputs(2, dim, side, side, rank=dim // 16)
        exact = {name: t.double() for name, t in inputs.items()}
        y_ref, grads_ref = with_grads(ss2d_scan, exact, backend='reference')
        y, grads = with_grads(ss2d_scan, inputs)
        errors = [relative_error(y, y_ref)]
        errors += [relative_error(grads[name], grads_ref[name]) for name in grads]
        worst = max(worst, *errors)
    print(f'ss2d_scan against its fp64 reference, outputs and gradients: relative error '
          f'{worst:.1e} (allowed 1e-5)', flush=True)
    if not worst <= 1e-5:
        sys.exit('The op is wrong; nothing was timed.')


def time_in_turns(models: dict, images: torch.Tensor, mode: str, rounds: int) -> dict[str, float]:
    """Median images/s of each model."""
    seconds = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            run(model, images, mode)
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: len(images) / statistics.median(s) for name, s in seconds.items()}


def peak_mib(name: str, mode: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, '--memory-of', name, mode, '--batch', str(args.batch),
               '--size', str(args.size), '--threads', str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'measuring the memory of {name} failed:\n{done.stderr}')
    return float(done.stdout.split()[-1])


def measure_memory(name: str, mode: str, args: argparse.Namespace) -> None:
    images = torch.randn(args.batch, 3, args.size, args.size)
    rss_before = psutil.Process().memory_info().rss
    model = build(name, args.size)
    for _ in range(2):
        run(model, images, mode)
    # Not getrusage: its maximum is inherited from the parent process.
    high_water = next(line for line in Path('/proc/self/status').read_text().splitlines()
                      if line.startswith('VmHWM'))
    print(int(high_water.split()[1]) / 2 ** 10 - rss_before / 2 ** 20)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='tiny_s1l8', choices=sorted(VMamba.arch_settings))
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/bench/cpu_vs_swin.json'))
    parser.add_argument('--memory-of', nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        measure_memory(*args.memory_of, args)
        return
    setting = (f'{platform.processor() or platform.machine()} ({cpu_name()}), {args.threads} '
               f'threads, fp32, batch {args.batch}, {args.size}x{args.size}, eager; torch '
               f'{torch.__version__}, timm {timm.__version__}, vmamba_mm {vmamba_mm.__version__}')
    print(setting)
    verify()

    names = (args.arch, PEER)
    images = torch.randn(args.batch, 3, args.size, args.size)
    models = {name: build(name, args.size) for name in names}
    rows = []
    for mode in MODES:
        speed = time_in_turns(models, images, mode, args.rounds)
        memory = {name: peak_mib(name, mode, args) for name in names}
        for what, unit, values in (('images/s', '', speed), ('peak memory', ' MiB', memory)):
            ratio = values[args.arch] / values[PEER]
            rows.append(dict(mode=mode, what=what, vmamba=values[args.arch], swin=values[PEER],
                             ratio=ratio))
            print(f'{mode:17s} {what:12s} {args.arch} {values[args.arch]:8.2f}{unit}   Swin-T '
                  f'{values[PEER]:8.2f}{unit}   ratio {ratio:.2f}', flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(setting=setting, rows=rows), indent=2) + '\n')
    print(f'written to {args.out}')


if __name__ == '__main__':
    main()
