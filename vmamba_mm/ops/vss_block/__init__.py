from vmamba_mm.ops.vss_block.cuda import why_not
from vmamba_mm.ops.vss_block.op import vss_block, vss_blocks

__all__ = ['vss_block', 'vss_blocks', 'why_not']
