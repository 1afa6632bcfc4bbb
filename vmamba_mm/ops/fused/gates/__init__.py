from vmamba_mm.ops.fused.gates.op import sigmoid_gate, squared_relu

__all__ = ['sigmoid_gate', 'squared_relu']
