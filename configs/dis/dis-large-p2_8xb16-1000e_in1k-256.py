_base_ = ['./_base_/in1k.py']

model = dict(backbone=dict(arch='large_p2'))
