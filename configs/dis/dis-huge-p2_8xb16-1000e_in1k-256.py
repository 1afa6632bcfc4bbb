_base_ = ['./_base_/in1k.py']

model = dict(backbone=dict(arch='huge_p2'))
