"""The old place of what is now in ``compile`` and ``launch``; goes when nobody imports it."""

from vmamba_mm.ops.core.compile import KERNELS as KERNELS
from vmamba_mm.ops.core.compile import NvrtcNotFound as NvrtcNotFound
from vmamba_mm.ops.core.compile import find_nvrtc as find_nvrtc
from vmamba_mm.ops.core.launch import Instance as Instance
from vmamba_mm.ops.core.launch import Kernel as Kernel
from vmamba_mm.ops.core.launch import cached as cached
from vmamba_mm.ops.core.launch import forget as forget
from vmamba_mm.ops.core.launch import kernel as kernel
from vmamba_mm.ops.core.launch import load as load
