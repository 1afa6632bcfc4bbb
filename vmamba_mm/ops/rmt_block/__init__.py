from vmamba_mm.ops.rmt_block.cuda import why_not
from vmamba_mm.ops.rmt_block.op import rmt_block
from vmamba_mm.ops.rmt_block.weights import Weights

__all__ = ['Weights', 'rmt_block', 'why_not']
