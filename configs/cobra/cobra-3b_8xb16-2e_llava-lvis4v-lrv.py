# Cobra-3B as published: projector and language model at once, two epochs.
_base_ = ['_base_/conversations.py']
