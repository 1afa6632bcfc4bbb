"""Every kernel instantiation that the ops load, for tools/check_kernels.py and the tests."""

from vmamba_mm.ops.core.launch import Instance
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import cast_instance
from vmamba_mm.ops.fused.channels import sum_instance
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.fused.stem.cuda import stem_instance
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.ss2d_scan import cuda as ss2d_scan
from vmamba_mm.ops.ss2d_scan import merge

_TYPES = {'Half': 75, 'BFloat': 80}
# Types of x, branch and result: pure half, autocast, pure fp32
_NORMS = [('Half', 'Half', 'Half'), ('BFloat', 'BFloat', 'BFloat'), ('Float', 'Half', 'Half'),
          ('Float', 'BFloat', 'BFloat'), ('Float', 'Float', 'Float')]

#: What is compiled, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **scans.INSTANCES,
    **ss2d_scan.INSTANCES,
    **merge.INSTANCES,
    **{kernel: 80 if 'BFloat' in types else 75 for types in _NORMS for kernel in (
        *(norm.forward_instance(*types, adds, *parts) for adds in (False, True)
          for parts in ((1, 16), (1,), (6,), (12,))),
        *(norm.backward_instance(types[2], types[0], types[1], *parts)
          for parts in ((1, 1, 16), (1, 1), (3, 2), (4, 4))))},
    norm.forward_instance('Half', 'Half', 'Float', False, 1): 75,
    norm.backward_instance('Float', 'Half', 'Half', 1, 1): 75,
    **{make(type_): _TYPES.get(type_, 75) for type_ in ('Half', 'BFloat', 'Float')
       for make in (lambda t: dwconv.forward_instance(t, True),
                    lambda t: dwconv.forward_instance(t, False), dwconv.backward_instance)},
    **{mlp.column_instance(type_, gelu): _TYPES.get(type_, 75)
       for type_ in ('Half', 'BFloat', 'Float') for gelu in (False, True)},
    **{stem_instance(image, type_, channels): low for type_, low in _TYPES.items()
       for image in ('Float', type_) for channels in (4, 8, 12, 16)},
    **{mlp.gelu_instance(type_): _TYPES.get(type_, 75) for type_ in ('Half', 'BFloat', 'Float')},
    **{cast_instance(type_): low for type_, low in _TYPES.items()},
    sum_instance(): 75,
}
