"""Imported once by the server that the tools are forked from."""
import contextlib
import gc

from vmamba_mm.mm.compat import prepare_mm

prepare_mm()
for name in ('mmpretrain.datasets', 'mmpretrain.models', 'mmseg.datasets', 'mmseg.models',
             'mmdet.datasets', 'mmdet.models', 'tensorboard', 'matplotlib.figure'):
    with contextlib.suppress(ImportError):
        __import__(name)
gc.freeze()  # a collection in a process forked from here need not look at all of that
