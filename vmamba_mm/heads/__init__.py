from vmamba_mm.heads.clip import ClipTower
from vmamba_mm.heads.videomamba import DistilledVideoMamba, MaskedVideoMamba, VideoEncoder

__all__ = ['ClipTower', 'DistilledVideoMamba', 'MaskedVideoMamba', 'VideoEncoder']
