"""How many Python calls a VSS block makes, and how often they go from one file to another.

A small map waits for Python, and so does who reads the code for the first time. Counted are the
calls of functions of the package, moves between its files, and the files, once everything is warm.

  python tools/bench/python_calls.py
  python tools/bench/python_calls.py --kernels    also with the CUDA kernels emulated on the CPU
"""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

import vmamba_mm
from vmamba_mm.layers import ConvDownsample, ConvStem, VSSBlock

PACKAGE = str(Path(vmamba_mm.__file__).parent)


def count(function):
    """Calls of functions of the package, those from another file of it, and its files."""
    counts = dict(calls=0, moves=0, files=set())

    def watch(frame, event, arg):
        file = frame.f_code.co_filename
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
    return counts['calls'], counts['moves'], len(counts['files'])


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
    print(f'{"":40}{"calls":>8}{"moves":>8}{"files":>8}')
    for device, context in devices:
        with context:
            for name, function in cases():
                for _ in range(3):
                    function()
                print(f'{device + ", " + name:40}' + ''.join(f'{n:8}' for n in count(function)),
                      flush=True)


if __name__ == '__main__':
    main()
