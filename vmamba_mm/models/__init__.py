from vmamba_mm.models.action_mamba import ActionMamba, MaskMambaBlock
from vmamba_mm.models.causal_lm import CausalLM
from vmamba_mm.models.timemamba import TimeMamba
from vmamba_mm.models.videomamba import VideoMamba
from vmamba_mm.models.vim import Vim
from vmamba_mm.models.vivim import ViViM
from vmamba_mm.models.vmamba import VMamba

__all__ = ['ActionMamba', 'CausalLM', 'MaskMambaBlock', 'TimeMamba', 'VMamba', 'ViViM',
           'VideoMamba', 'Vim']
