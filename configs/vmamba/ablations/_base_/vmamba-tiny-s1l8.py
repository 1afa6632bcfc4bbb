# T[s1l8] on ImageNet with its architecture spelled out, so that a config changes single keys.
_base_ = ['../../vmamba-tiny-s1l8_8xb128_in1k-224.py']

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,  # replaces the name of the variant
            embed_dims=96, depths=(2, 2, 8, 2), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv',
            scan='cross')))
