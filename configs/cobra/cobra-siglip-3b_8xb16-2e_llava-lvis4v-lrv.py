# Cobra-SigLIP-3B: one tower, and a projector of two layers.
_base_ = ['_base_/conversations.py']

model = dict(
    towers=[dict(name='vit_so400m_patch14_siglip_384', image_size=384, pretrained=True,
                 mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))],
    projector='mlp')
