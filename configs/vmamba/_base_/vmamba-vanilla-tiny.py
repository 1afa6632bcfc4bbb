# VMamba vanilla T: 16 states, gate, no MLP, patch merging.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='vanilla_tiny')
vmamba_channels = [96, 192, 384, 768]

# ImageNet weights that detection and segmentation start from.
vmamba_pretrained = dict(
    type='Pretrained',
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/'
               '%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth',
    prefix='backbone.')

# mmdet's and mmseg's inferencers read a checkpoint before they build the model; the safe reader of
# the published files registers on import.
custom_imports = dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
