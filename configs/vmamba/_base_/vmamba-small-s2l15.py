# VMamba S[s2l15]: ssm ratio 2, 15 blocks in stage 3.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='small_s2l15')
vmamba_channels = [96, 192, 384, 768]

# ImageNet weights that detection and segmentation start from.
vmamba_pretrained = dict(
    type='Pretrained',
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/'
               '%23v2cls/vssm_small_0229_ckpt_epoch_222.pth',
    prefix='backbone.')

# mmdet's and mmseg's inferencers read a checkpoint before they build the model; the safe reader of
# the published files registers on import.
custom_imports = dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
