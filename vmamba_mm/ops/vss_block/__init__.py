from vmamba_mm.ops.vss_block.cuda import why_not
from vmamba_mm.ops.vss_block.op import vss_block, vss_blocks
from vmamba_mm.ops.vss_block.weights import Weights

__all__ = ['Weights', 'vss_block', 'vss_blocks', 'why_not']
