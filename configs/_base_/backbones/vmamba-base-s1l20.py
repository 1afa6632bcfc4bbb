# VMamba B[s1l20]: ssm ratio 1, 20 blocks in stage 3.
# Leaf configs unpack `vmamba` and add what their task decides (drop path, out_indices).
vmamba = dict(type='vmamba_mm.VMamba', arch='base_s1l20')
vmamba_channels = [128, 256, 512, 1024]

# ImageNet weights that detection and segmentation start from:
# dict(type='Pretrained', checkpoint='<file or address>', prefix='backbone.').
# None starts from random weights, far below the published results.
vmamba_pretrained = None
