from vmamba_mm.models.action_mamba import ActionMamba, MaskMambaBlock
from vmamba_mm.models.causal_lm import CausalLM
from vmamba_mm.models.dis import DiS
from vmamba_mm.models.efficientvim import EfficientViM
from vmamba_mm.models.mambair import MambaIR, MambaIRUNet
from vmamba_mm.models.mambair_v2 import MambaIRv2
from vmamba_mm.models.mila import MILA
from vmamba_mm.models.pointmamba import PointMamba
from vmamba_mm.models.ravlt import RAVLT
from vmamba_mm.models.rmt import RMT
from vmamba_mm.models.rs_mamba import RemoteSensingMamba
from vmamba_mm.models.rsmamba import RSMamba
from vmamba_mm.models.seg_mamba import SegMambaEncoder
from vmamba_mm.models.timemamba import TimeMamba
from vmamba_mm.models.u_mamba import UMamba
from vmamba_mm.models.videomamba import VideoMamba
from vmamba_mm.models.vim import Vim
from vmamba_mm.models.vision_rwkv import VisionRWKV
from vmamba_mm.models.vision_rwkv_adapter import VisionRWKVAdapter
from vmamba_mm.models.vivim import ViViM
from vmamba_mm.models.vm_unet import VMUNet
from vmamba_mm.models.vmamba import VMamba
from vmamba_mm.models.vssd import VSSD

__all__ = ['MILA', 'RAVLT', 'RMT', 'VSSD', 'ActionMamba', 'CausalLM', 'DiS', 'EfficientViM',
           'MambaIR', 'MambaIRUNet', 'MambaIRv2', 'MaskMambaBlock', 'PointMamba', 'RSMamba',
           'RemoteSensingMamba', 'SegMambaEncoder', 'TimeMamba', 'UMamba', 'VMUNet', 'VMamba',
           'ViViM', 'VideoMamba', 'Vim', 'VisionRWKV', 'VisionRWKVAdapter']
