from vmamba_mm.heads.videomamba import DistilledVideoMamba, MaskedVideoMamba, VideoEncoder

__all__ = ['DistilledVideoMamba', 'MaskedVideoMamba', 'VideoEncoder']
