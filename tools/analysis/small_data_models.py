"""The models of small_data.py: VMamba's scans, and others of as many parameters."""

from small_data_recipe import RECIPE

from vmamba_mm.errors import UserError

SCANS = ('cross', 'unidirectional', 'bidirectional', 'cascade')
S6 = tuple(f'vmamba-{scan}' for scan in SCANS)
SSD, VSSD, SWIN = 'vmamba-ssd', 'vssd', 'swin'
MODELS = (*S6, SSD, VSSD, SWIN)
#: Heads of each stage of VSSD and Swin: those of VSSD's base, as embed_dims is a multiple of 12.
NUM_HEADS = (3, 6, 12, 24)
#: An mlp_ratio is matched in steps of 1 by this, as embed_dims is a multiple of 12. That of Swin is
#: the step of the reports that were made before the others were there.
STEPS = {SSD: 12, VSSD: 12, SWIN: 4}
MOST_DIFFERENCE = 0.02  # of parameters


def window_of(size):
    """Swin's window: the side of its last, third or second map, whichever is nearest to 7.

    It divides the maps of all stages but a smaller last one, so that nothing is padded; at 224 it
    is 7, as published.
    """
    return min((size // 32 * 2 ** i for i in range(3)), key=lambda w: abs(w - 7))


def build(name, num_classes, args, mlp_ratio=4.0):
    """One of MODELS for (B, 3, size, size), with random weights from torch's generator."""
    from vmamba_mm.families import FAMILIES
    from vmamba_mm.timm import TimmVMamba, register_models

    rate, depths = RECIPE['drop_path_rate'], tuple(args.depths)
    if name == SWIN:
        from timm.models.swin_transformer import SwinTransformer

        return SwinTransformer(
            img_size=args.size, window_size=window_of(args.size), embed_dim=args.embed_dims,
            depths=depths, num_heads=NUM_HEADS, mlp_ratio=mlp_ratio,
            num_classes=num_classes, drop_path_rate=rate)
    arch = dict(embed_dims=args.embed_dims, depths=depths, mlp_ratio=mlp_ratio)
    if name == VSSD:
        model = register_models(FAMILIES['vssd'])
        arch |= dict(base='tiny', num_heads=NUM_HEADS, d_state=args.d_state)
    elif name == SSD:
        model = TimmVMamba
        arch |= dict(base='tiny_m2', d_state=args.d_state, conv_kernel=args.conv_kernel)
    else:
        model = TimmVMamba
        arch |= dict(base='tiny_s1l8', conv_kernel=args.conv_kernel,
                     scan=name.removeprefix('vmamba-'))
    return model(arch, num_classes=num_classes, drop_path_rate=rate)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def match(name, num_classes, args):
    """The mlp_ratio, in STEPS, that brings a model's parameters nearest to those of VMamba with S6,
    whose own is 4.

    Raises:
        UserError: if it has more of them without an MLP.
    """
    if name in S6:
        return 4.0
    wanted, four, five = (count_parameters(build(model, num_classes, args, ratio))
                          for model, ratio in ((S6[0], 4.0), (name, 4.0), (name, 5.0)))
    steps = STEPS[name]
    ratio = round(steps * (4 + (wanted - four) / (five - four))) / steps
    if ratio <= 0:
        raise UserError(f'{name} has more parameters without an MLP than {S6[0]} with one: choose '
                        'a smaller --d-state or larger --embed-dims')
    return ratio


def describe_models(num_classes, args):
    """{model: its mlp_ratio, parameters and FLOPs of an image (a multiply-add is 1)}.

    Raises:
        UserError: if the parameters differ by more than 2 %.
    """
    from vmamba_mm.mm import flops

    models = {}
    for name in args.models:
        ratio = match(name, num_classes, args)
        model = build(name, num_classes, args, ratio)
        models[name] = dict(parameters=count_parameters(model), mlp_ratio=ratio,
                            flops=flops.count_module(model, (args.size, args.size)).flops)
    counts = [m['parameters'] for m in models.values()]
    if max(counts) > (1 + MOST_DIFFERENCE) * min(counts):
        raise UserError(f'the models have {min(counts):,} to {max(counts):,} parameters, which is '
                        f'more than {MOST_DIFFERENCE:.0%} apart: choose other --embed-dims or '
                        '--depths')
    return models
