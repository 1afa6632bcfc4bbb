# VMamba T[s1l8]: ssm ratio 1, 8 blocks in stage 3.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='tiny_s1l8')
vmamba_channels = [96, 192, 384, 768]

# ImageNet weights that detection and segmentation start from:
# dict(type='Pretrained', checkpoint='<file or address>', prefix='backbone.').
# None starts from random weights, far below the published results.
vmamba_pretrained = None
