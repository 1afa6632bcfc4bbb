_base_ = ['vision-rwkv-base_16xb64_in1k-224.py']

model = dict(
    backbone=dict(arch='v6_base'))
