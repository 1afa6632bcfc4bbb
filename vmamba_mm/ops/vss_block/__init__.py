from vmamba_mm.ops.vss_block.cuda import why_not
from vmamba_mm.ops.vss_block.op import vss_block

__all__ = ['vss_block', 'why_not']
