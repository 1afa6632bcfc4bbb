from vmamba_mm.layers.attention import AttentionState, CausalAttention, SelfAttention
from vmamba_mm.layers.drop_path import DropPath
from vmamba_mm.layers.embed import (
    ConvDownsample,
    ConvStem,
    MergeDownsample,
    PatchEmbed,
    PatchExpand,
    PatchStem,
)
from vmamba_mm.layers.experts import MixtureOfExperts, load_balance_loss
from vmamba_mm.layers.mamba import (
    BiMambaMixer,
    DecomposedBiMambaMixer,
    MambaMixer,
    MambaState,
    MultiPathMixer,
    SharedBiMambaMixer,
    TriMambaMixer,
)
from vmamba_mm.layers.mamba2 import Mamba2Mixer, Mamba2State
from vmamba_mm.layers.mamba_blocks import MambaBlock, run_blocks, run_blocks_to
from vmamba_mm.layers.norm import LayerNorm, LayerNorm2d, RMSNorm, RMSNormGated
from vmamba_mm.layers.projectors import Projector
from vmamba_mm.layers.recording import record_inputs, record_scan_inputs
from vmamba_mm.layers.retention import GatedMlp, MultiScaleRetention, RetentionState, RetNetBlock
from vmamba_mm.layers.rwkv import (
    RWKV4TimeMix,
    RWKV5TimeMix,
    RWKV6TimeMix,
    RWKV7TimeMix,
    RWKVChannelMix,
    TimeMixState,
)
from vmamba_mm.layers.rwkv_block import RWKVBlock, RWKVState
from vmamba_mm.layers.ss2d import SS2D
from vmamba_mm.layers.ssd2d import SSD2D
from vmamba_mm.layers.stage import Stage
from vmamba_mm.layers.vss_block import Mlp, VSSBlock, VSSStage

__all__ = ['SS2D', 'SSD2D', 'AttentionState', 'BiMambaMixer', 'CausalAttention', 'ConvDownsample',
           'ConvStem', 'DecomposedBiMambaMixer', 'DropPath', 'GatedMlp', 'LayerNorm', 'LayerNorm2d',
           'Mamba2Mixer', 'Mamba2State', 'MambaBlock', 'MambaMixer', 'MambaState',
           'MergeDownsample', 'MixtureOfExperts', 'Mlp', 'MultiPathMixer', 'MultiScaleRetention',
           'PatchEmbed', 'PatchExpand', 'PatchStem', 'Projector', 'RMSNorm', 'RMSNormGated',
           'RWKV4TimeMix', 'RWKV5TimeMix', 'RWKV6TimeMix', 'RWKV7TimeMix', 'RWKVBlock',
           'RWKVChannelMix', 'RWKVState', 'RetNetBlock', 'RetentionState', 'SelfAttention',
           'SharedBiMambaMixer', 'Stage', 'TimeMixState', 'TriMambaMixer', 'VSSBlock', 'VSSStage',
           'load_balance_loss', 'record_inputs', 'record_scan_inputs', 'run_blocks',
           'run_blocks_to']
