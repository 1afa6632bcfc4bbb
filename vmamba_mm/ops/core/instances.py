"""Every kernel instantiation that the ops load, for tools/check_kernels.py and the tests."""

from vmamba_mm.ops.core.nvrtc import Instance
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.cast import cast_instance
from vmamba_mm.ops.fused.channels import sum_instance
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.fused.stem.cuda import stem_instance
from vmamba_mm.ops.scan_kernels import cuda as walk
from vmamba_mm.ops.ss2d_scan import cuda, merge, schedule

_TYPES = {'Half': 75, 'BFloat': 80}
_TILES = (1, 2, 3, 4, 6, 8)  # of 8 in dt_rank: those of the nine published architectures
# Type, states of a thread, selective_scan: half maps with N = 1 have kernels of their own.
_WALKS = [('Half', 16, False), ('BFloat', 16, False), ('Float', 1, False), ('Float', 16, False),
          ('Half', 1, True), ('Float', 16, True)]

# Types of x, branch and result: pure half, autocast, pure fp32
_NORMS = [('Half', 'Half', 'Half'), ('BFloat', 'BFloat', 'BFloat'), ('Float', 'Half', 'Half'),
          ('Float', 'BFloat', 'BFloat'), ('Float', 'Float', 'Float')]

#: What is compiled, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **{kernel: low for type_, low in _TYPES.items() for tiles in _TILES
       for kernel in (cuda.forward_instance(type_, tiles),
                      cuda.backward_instance(type_, tiles, False))},
    **{cuda.runs_instance(type_, tiles): low for type_, low in _TYPES.items() for tiles in _TILES},
    **{cuda.forward_instance(type_, tiles, 8): 90 for type_ in _TYPES for tiles in _TILES},
    **{cuda.forward_instance('Half', 1, cluster): 90 for cluster in schedule.CLUSTER_SIZES},
    **{cuda.backward_instance(type_, 1, True): low for type_, low in _TYPES.items()},
    **{make(type_): low for type_, low in _TYPES.items()
       for make in (cuda.prepare_instance, cuda.finish_instance)},
    **{merge.merge_instance(type_, *rest): low for type_, low in _TYPES.items()
       for rest in ((4, False, 1, False), (4, False, 1, True), (4, False, 12, False),
                    (4, True, 12, False), (2, False, 12, False), (2, True, 12, False))},
    **{merge.merge_instance('Float', maps, extra, parts, False): 75 for maps, extra, parts in (
        (1, True, 12), (2, True, 12), (4, False, 1), (4, False, 12), (4, True, 12))},
    **{kernel: _TYPES.get(type_, 75) for type_, states, sequence in _WALKS
       for kernel in (walk.forward_instance(type_, states, sequence, walk.RUN),
                      walk.backward_instance(type_, states, sequence))},
    **{walk.forward_instance('Half', 16, False, mode): 75 for mode in (walk.ENDS, walk.GRADIENTS)},
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
    walk.prepare_instance(): 75,
    walk.finish_instance(): 75,
    walk.combine_instance(): 75,
}
