_base_ = ['vision-rwkv-small_8xb128_in1k-224.py']

model = dict(
    backbone=dict(arch='v6_small'))
