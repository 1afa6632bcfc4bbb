from vmamba_mm.ops.retention.op import retention
from vmamba_mm.ops.retention.step import retention_step

__all__ = ['retention', 'retention_step']
