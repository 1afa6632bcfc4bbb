# VMamba B[s1l20]: ssm ratio 1, 20 blocks in stage 3.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='base_s1l20')
vmamba_channels = [128, 256, 512, 1024]

# ImageNet weights that detection and segmentation start from.
vmamba_pretrained = dict(
    type='Pretrained',
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/'
               '%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth',
    prefix='backbone.')

# mmdet's and mmseg's inferencers read a checkpoint before they build the model; the safe reader of
# the published files registers on import.
custom_imports = dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
