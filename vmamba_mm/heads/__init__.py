"""Decoders and models of tasks that are no backbones, for mmengine's registry."""

from vmamba_mm.heads.clip import ClipTower
from vmamba_mm.heads.cobra import Chat, Cobra, ConversationPreprocessor
from vmamba_mm.heads.losses import DiceLoss
from vmamba_mm.heads.masked_points import MaskedPointMamba
from vmamba_mm.heads.points import (
    PartSegHead,
    PointClassifier,
    PointHead,
    PointPreprocessor,
    PointSegmentor,
)
from vmamba_mm.heads.pyramid import SimpleFeaturePyramid
from vmamba_mm.heads.rs_mamba import ChannelFusion, ConcatDecoder, RemoteSensingModel
from vmamba_mm.heads.seg_mamba import ResidualDecoder, SegMamba
from vmamba_mm.heads.stage_fusion import StageFusionHead
from vmamba_mm.heads.taught import HardDistillation, TimmTeacher
from vmamba_mm.heads.token_label import TokenLabelHead
from vmamba_mm.heads.tokenizers import ByteTokenizer, FileTokenizer
from vmamba_mm.heads.towers import VisionTower
from vmamba_mm.heads.video import ClipPreprocessor, VideoClassifier
from vmamba_mm.heads.videomamba import (
    DistilledVideoMamba,
    MaskedVideoMamba,
    SelfDistillation,
    VideoEncoder,
)

__all__ = ['ByteTokenizer', 'ChannelFusion', 'Chat', 'ClipPreprocessor', 'ClipTower', 'Cobra',
           'ConcatDecoder', 'ConversationPreprocessor', 'DiceLoss', 'DistilledVideoMamba',
           'FileTokenizer', 'HardDistillation', 'MaskedPointMamba', 'MaskedVideoMamba',
           'PartSegHead', 'PointClassifier', 'PointHead', 'PointPreprocessor', 'PointSegmentor',
           'RemoteSensingModel', 'ResidualDecoder', 'SegMamba', 'SelfDistillation',
           'SimpleFeaturePyramid', 'StageFusionHead', 'TimmTeacher', 'TokenLabelHead',
           'VideoClassifier', 'VideoEncoder', 'VisionTower']
