"""Video classification on mmengine's Runner, with mmpretrain's heads, losses and metrics.

==============  ====================================================================
``reader``      frames of a video file, decoded by PyAV
``sampling``    which frames make a clip
``dataset``     lists and folders of video files
``transforms``  from a file to clips: loading, augmentation, crops, packing
==============  ====================================================================
"""
