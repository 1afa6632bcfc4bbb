"""Every kernel instantiation that the ops load, for tools/check_kernels.py and the tests."""

from vmamba_mm.ops.nvrtc import Instance
from vmamba_mm.ops.ss2d_scan import cuda

# Tiles of 8 in dt_rank: 1 to 8 are those of the nine published architectures.
_TYPES = {'Half': 75, 'BFloat': 80}
_SCANS = [(type_, tiles, one_state, summary) for type_ in _TYPES for tiles in (1, 2, 3, 4, 6, 8)
          for one_state, summary in ((True, False), (False, False))]
_SCANS += [(type_, 1, one_state, True) for type_ in _TYPES for one_state in (True, False)]

#: What is compiled, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    **{cuda.scan_instance(*scan): _TYPES[scan[0]] for scan in _SCANS},
    **{cuda.prepare_instance(type_): low for type_, low in _TYPES.items()},
    **{cuda.merge_instance(type_, parts, to_float): low for type_, low in _TYPES.items()
       for parts in (1, 6, 12) for to_float in (False, True)},
    cuda.combine_instance(): 75,
}
