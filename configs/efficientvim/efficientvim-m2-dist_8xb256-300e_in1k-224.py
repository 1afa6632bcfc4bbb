_base_ = ['efficientvim-m2_8xb256-300e_in1k-224.py']

# Hard distillation (DeiT, arXiv 2012.12877), without MESA. Training loads the teacher from timm.
model = dict(
    type='vmamba_mm.HardDistillation',
    head=dict(distilled=True),
    teacher=dict(type='vmamba_mm.TimmTeacher', model_name='regnety_160.deit_in1k'))
custom_hooks = [_base_.custom_hooks[0]]
