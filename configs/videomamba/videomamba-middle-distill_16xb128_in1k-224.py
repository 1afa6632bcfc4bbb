# The published recipe of middle: self-distillation from a trained small model. Evaluate its files
# with this config; without distill_head they are those of the plain classifier.
_base_ = ['videomamba-middle_16xb128_in1k-224.py']

model = dict(
    type='vmamba_mm.SelfDistillation',
    backbone=dict(out_type='raw'),
    teacher=dict(
        type='vmamba_mm.VideoMamba',
        arch='small',
        out_type='raw',
        init_cfg=dict(
            type='Pretrained', checkpoint='vmamba_mm://videomamba/small.in1k',
            prefix='backbone.')))
