_base_ = ['./_base_/in1k.py']

model = dict(backbone=dict(arch='base_p2'))
