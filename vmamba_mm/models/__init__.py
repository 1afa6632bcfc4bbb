from vmamba_mm.models.causal_lm import CausalLM
from vmamba_mm.models.videomamba import VideoMamba
from vmamba_mm.models.vim import Vim
from vmamba_mm.models.vmamba import VMamba

__all__ = ['CausalLM', 'VMamba', 'VideoMamba', 'Vim']
