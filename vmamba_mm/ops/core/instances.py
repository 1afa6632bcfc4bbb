"""Every kernel instantiation that tools/check_kernels.py and the tests compile.

Each module with launches says in its ``INSTANCES`` what there is, and why.
"""

from vmamba_mm.ops.causal_conv import cuda as causal_conv
from vmamba_mm.ops.core.launch import Instance
from vmamba_mm.ops.fused import cast, channels, layer_scale
from vmamba_mm.ops.fused.add_norm import cuda as add_norm
from vmamba_mm.ops.fused.batch_norm import cuda as batch_norm
from vmamba_mm.ops.fused.dwconv import cuda as dwconv
from vmamba_mm.ops.fused.gates import cuda as gates
from vmamba_mm.ops.fused.mlp import cuda as mlp
from vmamba_mm.ops.fused.stem import cuda as stem
from vmamba_mm.ops.mamba_blocks import cuda as mamba_blocks
from vmamba_mm.ops.mamba_inner import cuda as mamba_inner
from vmamba_mm.ops.masa import cuda as masa
from vmamba_mm.ops.masa import lepe
from vmamba_mm.ops.nc_ssd import cuda as nc_ssd
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.selective_scan import cuda_scan
from vmamba_mm.ops.shift_mix import cuda as shift_mix
from vmamba_mm.ops.ss2d_scan import cuda as ss2d_scan
from vmamba_mm.ops.ss2d_scan import merge
from vmamba_mm.ops.ssd import cuda_launch as ssd
from vmamba_mm.ops.wkv import cuda_launch as wkv

#: What is compiled, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    instance: low
    for module in (scans, cuda_scan, causal_conv, mamba_inner, mamba_blocks, ss2d_scan, merge,
                   add_norm, batch_norm, dwconv, mlp, stem, cast, channels, ssd, nc_ssd, wkv, masa,
                   lepe, gates, shift_mix, layer_scale)
    for instance, low in module.INSTANCES.items()}
