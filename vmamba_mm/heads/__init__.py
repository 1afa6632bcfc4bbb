from vmamba_mm.heads.pyramid import SimpleFeaturePyramid
from vmamba_mm.heads.videomamba import DistilledVideoMamba, MaskedVideoMamba, VideoEncoder

__all__ = ['DistilledVideoMamba', 'MaskedVideoMamba', 'SimpleFeaturePyramid', 'VideoEncoder']
