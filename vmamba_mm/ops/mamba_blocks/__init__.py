from vmamba_mm.ops.mamba_blocks.cuda import why_not
from vmamba_mm.ops.mamba_blocks.op import mamba_block, mamba_blocks
from vmamba_mm.ops.mamba_blocks.weights import Direction, Weights, flatten

__all__ = ['Direction', 'Weights', 'flatten', 'mamba_block', 'mamba_blocks', 'why_not']
