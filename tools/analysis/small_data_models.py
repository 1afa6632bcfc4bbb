"""The models of small_data.py: VMamba's scans, and Swin of as many parameters."""

from small_data_recipe import RECIPE

from vmamba_mm.errors import UserError

SCANS = ('cross', 'unidirectional', 'bidirectional', 'cascade')
MODELS = tuple(f'vmamba-{scan}' for scan in SCANS) + ('swin',)
MOST_DIFFERENCE = 0.02  # of parameters


def window_of(size):
    """Swin's window: the side of its last, third or second map, whichever is nearest to 7.

    It divides the maps of all stages but a smaller last one, so that nothing is padded; at 224 it
    is 7, as published.
    """
    return min((size // 32 * 2 ** i for i in range(3)), key=lambda w: abs(w - 7))


def build(name, num_classes, args, mlp_ratio=4.0):
    """One of MODELS for (B, 3, size, size), with random weights from torch's generator."""
    from timm.models.swin_transformer import SwinTransformer

    from vmamba_mm.families.vmamba import ARCHS
    from vmamba_mm.timm import TimmVMamba

    rate = RECIPE['drop_path_rate']
    if name == 'swin':
        return SwinTransformer(
            img_size=args.size, window_size=window_of(args.size), embed_dim=args.embed_dims,
            depths=args.depths, num_heads=(3, 6, 12, 24), mlp_ratio=mlp_ratio,
            num_classes=num_classes, drop_path_rate=rate)
    arch = {**ARCHS['tiny_s1l8'], 'embed_dims': args.embed_dims,
            'depths': tuple(args.depths), 'conv_kernel': args.conv_kernel,
            'scan': name.removeprefix('vmamba-')}
    return TimmVMamba(arch, num_classes=num_classes, drop_path_rate=rate)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def match_swin(num_classes, args):
    """Swin's mlp_ratio, in quarters, that brings its parameters nearest to VMamba's."""
    wanted, four, five = (count_parameters(build(name, num_classes, args, ratio)) for name, ratio
                          in ((MODELS[0], None), ('swin', 4), ('swin', 5)))
    return round(4 * (4 + (wanted - four) / (five - four))) / 4


def describe_models(num_classes, args):
    """{model: its mlp_ratio, parameters and FLOPs of an image (a multiply-add is 1)}.

    Raises:
        UserError: if the parameters differ by more than 2 %.
    """
    from vmamba_mm.mm import flops

    models = {}
    for name in args.models:
        ratio = match_swin(num_classes, args) if name == 'swin' else 4.0
        model = build(name, num_classes, args, ratio)
        models[name] = dict(parameters=count_parameters(model), mlp_ratio=ratio,
                            flops=flops.count_module(model, (args.size, args.size)).flops)
    counts = [m['parameters'] for m in models.values()]
    if max(counts) > (1 + MOST_DIFFERENCE) * min(counts):
        raise UserError(f'the models have {min(counts):,} to {max(counts):,} parameters, which is '
                        f'more than {MOST_DIFFERENCE:.0%} apart: choose other --embed-dims or '
                        '--depths')
    return models
