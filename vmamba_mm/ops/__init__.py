"""The ops: functions on tensors, torch only. The maths is in README.md beside this."""

from vmamba_mm.ops.causal_conv import causal_conv, causal_conv_step
from vmamba_mm.ops.core.backends import BACKENDS
from vmamba_mm.ops.fused.add_norm import add_norm, layer_norm, rms_norm
from vmamba_mm.ops.fused.batch_norm import evaluate_batch_norm
from vmamba_mm.ops.fused.conv_mlp import conv_mlp
from vmamba_mm.ops.fused.conv_norm import channels_last, conv_norm
from vmamba_mm.ops.fused.dwconv import dwconv_add, dwconv_silu
from vmamba_mm.ops.fused.gates import sigmoid_gate, squared_relu
from vmamba_mm.ops.fused.linear_relu import linear_relu
from vmamba_mm.ops.fused.mlp import mlp
from vmamba_mm.ops.fused.patch_norm import expand_norm, merge_norm
from vmamba_mm.ops.fused.stem import conv_norm_gelu
from vmamba_mm.ops.linear_attention import linear_attention
from vmamba_mm.ops.mamba_inner import mamba_inner
from vmamba_mm.ops.masa import decay_masks, masa, masa_mixer
from vmamba_mm.ops.matrix_wkv import bi_wkv6, wkv5, wkv6, wkv6_step, wkv7, wkv7_step
from vmamba_mm.ops.nc_ssd import nc_ssd, nc_ssd_mixer, nc_ssd_norm
from vmamba_mm.ops.orders import across_slices, along_slices, cross_merge, cross_scan
from vmamba_mm.ops.retention import retention, retention_step
from vmamba_mm.ops.selective_scan import selective_scan, selective_scan_step
from vmamba_mm.ops.shift_mix import shift_mix
from vmamba_mm.ops.ss2d_scan import ss2d_attention, ss2d_scan, ss2d_scan_norm
from vmamba_mm.ops.ss2d_scan.ordered import ordered_scan, scan_positions
from vmamba_mm.ops.ss2d_scan.patterns import register_scan, scan_norm, scan_patterns
from vmamba_mm.ops.ssd import ssd, ssd_step
from vmamba_mm.ops.vision_rwkv import channel_mixer, spatial_mixer
from vmamba_mm.ops.wkv import bi_wkv, wkv, wkv_step

__all__ = ['BACKENDS', 'across_slices', 'add_norm', 'along_slices', 'bi_wkv', 'bi_wkv6',
           'causal_conv', 'causal_conv_step', 'channel_mixer', 'channels_last', 'conv_mlp',
           'conv_norm', 'conv_norm_gelu', 'cross_merge', 'cross_scan', 'decay_masks', 'dwconv_add',
           'dwconv_silu', 'evaluate_batch_norm', 'expand_norm', 'layer_norm', 'linear_attention',
           'linear_relu', 'mamba_inner', 'masa', 'masa_mixer', 'merge_norm', 'mlp', 'nc_ssd',
           'nc_ssd_mixer', 'nc_ssd_norm', 'ordered_scan', 'register_scan', 'retention',
           'retention_step', 'rms_norm', 'scan_norm', 'scan_patterns', 'scan_positions',
           'selective_scan', 'selective_scan_step', 'shift_mix', 'sigmoid_gate', 'spatial_mixer',
           'squared_relu', 'ss2d_attention', 'ss2d_scan', 'ss2d_scan_norm', 'ssd', 'ssd_step',
           'wkv', 'wkv5', 'wkv6', 'wkv6_step', 'wkv7', 'wkv7_step', 'wkv_step']
