# Cobra-LDPNet-3B: 196 tokens of an image in place of 729.
_base_ = ['_base_/conversations.py']

model = dict(projector='fused-ldp')
