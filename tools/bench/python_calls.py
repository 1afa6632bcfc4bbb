"""How many Python calls a block or an op makes, and how often they go from one file to another.

A small map waits for Python, and so does who reads the code for the first time. Counted are the
calls of functions of the package, moves between its files, and the files, once everything is warm;
then what is launched: kernels and products of the package, and operators of PyTorch that calculate
something.

  python tools/bench/python_calls.py
  python tools/bench/python_calls.py --kernels    also with the CUDA kernels emulated on the CPU
"""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vmamba_mm
from vmamba_mm.layers import (
    BiMambaMixer,
    ConvDownsample,
    ConvStem,
    MambaBlock,
    MambaMixer,
    RMSNorm,
    VSSBlock,
)
from vmamba_mm.ops import selective_scan

PACKAGE = str(Path(vmamba_mm.__file__).parent)
EMULATOR = 'emulated_cuda.py'


class Operators(TorchDispatchMode):
    """Counts the operators of PyTorch that neither are views nor allocate alone."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        makes_nothing = func.is_view or func.name().partition('.')[0] in (
            'aten::detach', 'aten::empty', 'aten::empty_like', 'aten::new_empty')
        self.count += func.namespace == 'aten' and not makes_nothing
        return func(*args, **kwargs or {})


def count(function):
    """Calls of functions of the package, those from another file of it, its files, its launches,
    and operators of PyTorch beside them."""
    with Operators() as operators:  # by itself, as the ops take another way when they are watched
        function()
    counts = dict(calls=0, moves=0, files=set(), launches=0)

    def watch(frame, event, arg):
        file = frame.f_code.co_filename
        if event == 'call' and file.endswith(EMULATOR):
            counts['launches'] += frame.f_code.co_name in ('start', 'run')
        if event != 'call' or not file.startswith(PACKAGE):
            return
        counts['calls'] += 1
        counts['files'].add(file)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        counts['moves'] += caller is not None and caller.f_code.co_filename != file

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return (counts['calls'], counts['moves'], len(counts['files']), counts['launches'],
            operators.count)


def cases():
    """The (name, function to call) of each row."""
    torch.manual_seed(0)
    block = VSSBlock(32, mlp_ratio=4.0, drop_path=0.0, with_cp=False, ssm_cfg=dict(ssm_ratio=1.0))
    x = torch.randn(1, 7, 7, 32)

    def infer(module, x):
        def forward():
            with torch.no_grad():
                module.eval()(x)
        return forward

    yield 'block, inference', infer(block, x)
    yield 'block, training, forward', lambda: block.train()(x.requires_grad_())
    y = block.train()(x.requires_grad_())
    yield 'block, training, backward', lambda: y.sum().backward(retain_graph=True)
    handle = block.ssm.in_proj.register_forward_hook(lambda *args: None)
    yield 'block with a hook, inference', infer(block, x)
    handle.remove()
    yield 'stem, inference', infer(ConvStem(3, 32), torch.randn(1, 3, 32, 32))
    yield 'downsampling, inference', infer(ConvDownsample(32), x)

    u, A, B = torch.randn(1, 32, 17), -torch.rand(32, 16), torch.randn(1, 1, 16, 17)
    sequences = [t.requires_grad_() for t in (u, u.clone().detach(), A, B, B.clone().detach())]

    def scan():
        return selective_scan(*sequences, delta_softplus=True)

    y, grad = scan(), torch.ones_like(u)
    yield 'selective_scan, training, forward', scan
    yield 'selective_scan, training, backward', lambda: torch.autograd.grad(
        y, sequences, grad, retain_graph=True)

    streams = torch.randn(1, 17, 32), torch.randn(1, 17, 32)
    for name, mixer in (('Mamba', MambaMixer), ('Vim', BiMambaMixer)):
        block = MambaBlock(mixer(32), RMSNorm(32))

        def forward(block=block):
            hidden, residual = block.train()(*[t.requires_grad_() for t in streams])
            return hidden.sum() + residual.sum()

        yield f"{name}'s block, inference", infer_streams(block, streams)
        yield f"{name}'s block, training, forward", forward
        loss = forward()
        yield f"{name}'s block, training, backward", lambda loss=loss: loss.backward(
            retain_graph=True)


def infer_streams(block, streams):
    def forward():
        with torch.no_grad():
            block.eval()(*streams)
    return forward


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kernels', action='store_true',
                        help='also the path of an NVIDIA GPU, with the kernels emulated (it '
                             'compiles them for a minute or two; needs a C++ compiler)')
    args = parser.parse_args()
    devices = [('CPU', nullcontext())]
    if args.kernels:
        sys.path.insert(0, str(Path(PACKAGE).parent / 'tests/ops'))
        from emulated_cuda import emulated_gpu
        devices.append(('kernels', emulated_gpu(Path(tempfile.mkdtemp()))))
    print(f'{"":42}' + ''.join(f'{name:>9}' for name in (
        'calls', 'moves', 'files', 'launches', 'torch')))
    for device, context in devices:
        with context:
            for name, function in cases():
                for _ in range(3):
                    function()
                print(f'{device + ", " + name:42}' + ''.join(f'{n:9}' for n in count(function)),
                      flush=True)


if __name__ == '__main__':
    main()
