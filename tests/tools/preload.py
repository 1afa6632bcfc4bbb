"""Imported once by the server that the tools are forked from."""
import contextlib
import functools
import gc

from yapf.yapflib import yapf_api

from vmamba_mm.mm.compat import prepare_mm

prepare_mm()
for name in ('mmpretrain', 'mmseg', 'mmdet'):
    for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization'):
        with contextlib.suppress(ImportError):
            __import__(f'{name}.{part}')
for name in ('tensorboard', 'torch.utils.tensorboard', 'matplotlib.figure', 'vmamba_mm.layers'):
    with contextlib.suppress(ImportError):
        __import__(name)


# mmengine formats the same config for each log, file and checkpoint, which is half of the time of
# a short training. The result depends on the text alone.
_format_code, _formatted = yapf_api.FormatCode, {}


@functools.wraps(_format_code)
def _format_code_once(text, **options):
    key = text, str(options)
    if key not in _formatted:
        _formatted[key] = _format_code(text, **options)
    return _formatted[key]


yapf_api.FormatCode = _format_code_once
gc.freeze()  # a collection in a process forked from here need not look at all of that
