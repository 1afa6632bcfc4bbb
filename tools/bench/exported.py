"""Latency and size of models in other runtimes beside PyTorch's eager mode, each checked first.

Random weights of the true architectures; one image on a CPU. A line that says why stands where a
model cannot be exported so.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from vmamba_mm import models
from vmamba_mm.errors import UserError
from vmamba_mm.integrations.export import TARGETS, export_model
from vmamba_mm.mm.measuring import cpu_name

#: The name in the table, the class, its arch and its arguments as a classifier's backbone.
MODELS = {
    'VMamba-T': ('VMamba', 'tiny_s1l8', dict(out_indices=(3,))),
    'Vim-S': ('Vim', 'small', dict()),
    'VSSD-T': ('VSSD', 'tiny', dict(out_indices=(3,))),
    'RMT-T': ('RMT', 'tiny', dict(out_indices=(3,))),
    'EfficientViM-M1': ('EfficientViM', 'm1', dict()),
    'Vision-RWKV-T': ('VisionRWKV', 'tiny', dict())}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--to', nargs='+', choices=TARGETS, default=['onnx', 'openvino', 'pt2'])
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'{cpu_name()}, {args.threads} thread(s), torch {torch.__version__}, one image of '
          f'{args.size} x {args.size}, fp32')
    print('| Model | Runtime | Nodes | MB | Largest error | ms | Eager, ms | Eager / it |')
    print('|---|---|---|---|---|---|---|---|')
    for name in args.models:
        kind, arch, options = MODELS[name]
        torch.manual_seed(0)
        model = getattr(models, kind)(arch, **options).eval()
        for to in args.to:
            try:
                print(f'| {name} | {to} | {measure(model, to, args.size)} |', flush=True)
            except UserError as err:
                print(f'| {name} | {to} | {err} | | | | | |', flush=True)


def measure(model, to, size):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f'model{TARGETS[to].suffix}'
        report = export_model(model, to, file, size=(size, size))
    if not report.is_right:
        raise UserError('the error is above its limit: ' + '; '.join(report.lines()))
    nodes = '' if report.nodes is None else f'{report.nodes:,}'
    return (f'{nodes} | {report.size / 1e6:.0f} | {max(report.errors.values()):.0e} | '
            f'{report.ms:.0f} | {report.eager_ms:.0f} | {report.eager_ms / report.ms:.2f}')


if __name__ == '__main__':
    main()
