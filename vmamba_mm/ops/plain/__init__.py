"""Every op that runs on a CPU as a node of a graph, in plain PyTorch: for exporters, tracers and
other runtimes, which do not know our ops."""

import contextlib
from collections.abc import Iterator

from vmamba_mm.ops.core import forms
from vmamba_mm.ops.linear_attention import chunked as linear_attention
from vmamba_mm.ops.nc_ssd import chunked as nc_ssd
from vmamba_mm.ops.orders import reference as orders
from vmamba_mm.ops.plain import products, recurrence, scans, wkv
from vmamba_mm.ops.ss2d_scan import patterns

#: By the name of an op, its plain form.
FORMS = {
    'causal_conv_fwd': scans.causal_conv,
    'cross_merge': orders.merge_forward,
    'cross_scan': orders.scan_forward,
    'linear_attention_fwd': linear_attention.compose,
    'mamba_inner_fwd': scans.mamba_inner,
    'nc_ssd_fwd': nc_ssd.compose,
    'ordered_scan_fwd': scans.ordered_scan,
    'reorder': patterns._order,
    'retention_fwd': products.retention,
    'selective_scan_fwd': scans.selective_scan,
    'ss2d_scan_fwd': scans.ss2d_scan,
    'ssd_fwd': products.ssd,
    'bi_wkv_fwd': wkv.bi_wkv,
    'wkv_fwd': wkv.wkv,
    'wkv6_fwd': wkv.wkv6}


@contextlib.contextmanager
def plain_ops(way: str = 'unrolled') -> Iterator[None]:
    """Models are recorded without our ops, in plain PyTorch.

    For ``torch.export``, ``torch.jit.trace`` and the like, in inference: a graph that was recorded
    in this context needs nothing of this package. Recurrences are steps one after the other, so
    that it is one for the size of the example.

    Args:
        way: 'unrolled'; or 'native' for ops of a library in C++, for AOTInductor; or 'node' or
            'first' for nodes that :mod:`vmamba_mm.integrations.export` translates to ONNX.

    Raises:
        ValueError: on another ``way``.
    """
    with recurrence.record_as(way), forms.use(FORMS):
        yield
