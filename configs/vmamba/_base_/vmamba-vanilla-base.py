# VMamba vanilla B: 16 states, gate, no MLP, patch merging.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='vanilla_base')
vmamba_channels = [128, 256, 512, 1024]

# ImageNet weights that detection and segmentation start from. The published dense models of this
# backbone started from an older run (83.2 % top-1, drop path 0.5), not from the listed one (83.7 %,
# %23v0cls/vssmbase_dp06_ckpt_epoch_241.pth).
vmamba_pretrained = dict(
    type='Pretrained',
    checkpoint='https://github.com/MzeroMiko/VMamba/releases/download/'
               '%2320240218/vssmbase_dp05_ckpt_epoch_260.pth',
    prefix='backbone.')

# mmdet's and mmseg's inferencers read a checkpoint before they build the model; the safe reader of
# the published files registers on import.
custom_imports = dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
