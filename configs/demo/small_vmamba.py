# The backbone of the three demos: T[s1l8] with a third of its channels and fewer blocks.
small_arch = dict(
    _delete_=True,  # replaces the name of the variant
    embed_dims=32, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto', conv_bias=False,
    gate=False, mlp_ratio=4.0, stem='conv', downsample='conv', scan='cross')
small_channels = [32, 64, 128, 256]

# The classifier that `make demo` leaves, which the other two demos start from.
small_pretrained = dict(
    _delete_=True,
    type='Pretrained', checkpoint='work_dirs/demo-cls/classifier.pth', prefix='backbone.')
