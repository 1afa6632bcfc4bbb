"""Every kernel instantiation that the ops load, for tools/check_kernels.py and the tests."""

from vmamba_mm.ops.nvrtc import Instance

#: What is compiled, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {}
