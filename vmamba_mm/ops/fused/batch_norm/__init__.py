from vmamba_mm.ops.fused.batch_norm.op import evaluate_batch_norm

__all__ = ['evaluate_batch_norm']
