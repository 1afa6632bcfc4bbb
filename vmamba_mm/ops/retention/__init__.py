from vmamba_mm.ops.retention.op import log_decays, retention
from vmamba_mm.ops.retention.step import retention_step

__all__ = ['log_decays', 'retention', 'retention_step']
