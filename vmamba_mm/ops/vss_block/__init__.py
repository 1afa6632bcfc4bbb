from vmamba_mm.ops.vss_block.cuda import why_not
from vmamba_mm.ops.vss_block.op import vss_block, vss_blocks
from vmamba_mm.ops.vss_block.weights import OF_MLP, Weights

__all__ = ['OF_MLP', 'Weights', 'vss_block', 'vss_blocks', 'why_not']
