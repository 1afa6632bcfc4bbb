"""VMamba under the generic tests."""

import json
import re

from official import S1, SHARED, VANILLA, classifier_state, dense_state
from specs import Spec

from vmamba_mm.families.vmamba import FAMILY
from vmamba_mm.models import VMamba

OTHER = dict(S1, d_state=2, act='relu', conv_kernel=0, gate=True, ssm_init='zero')
SSD = dict(S1, embed_dims=(8, 16, 32, 48), d_state=3, core='ssd')


def _shapes(arch, height, width):
    up = arch['stem'] == 'conv'
    height, width = (-(-side // 4) if up else max(1, side // 4) for side in (height, width))
    shapes, dims = [], arch['embed_dims']
    for channels in dims if isinstance(dims, tuple) else [dims * 2 ** i for i in range(4)]:
        shapes.append((channels, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _published_keys():
    """Those of the classifiers; a list of some gives the blocks of a stage that are alike once, as
    ``blocks.0..3``."""
    paths = [SHARED / 'facts/official_keys.json', SHARED / 'facts/keys/vmamba_m2.json']
    if not all(path.is_file() for path in paths):
        return None
    published = {}
    for name, model in [item for path in paths for item in json.loads(path.read_text()).items()]:
        keys = published[name.removeprefix('vmamba_')] = {}
        for key, shape in model['keys'].items():
            if match := re.fullmatch(r'(.*)\b(\d+)\.\.(\d+)\b(.*)', key):
                start, first, last, end = match.groups()
                names = [f'{start}{i}{end}' for i in range(int(first), int(last) + 1)]
            else:
                names = [key]
            keys.update(dict.fromkeys(names, tuple(shape)))
    return published


SPEC = Spec(
    family=FAMILY, model=VMamba,
    archs=dict(s1=S1, vanilla=dict(VANILLA, d_state=4), other=OTHER, ssd=SSD), shapes=_shapes,
    published_keys=_published_keys,
    changes=[
        dict(embed_dims=12), dict(depths=(1, 2, 3, 4)), dict(d_state=3), dict(ssm_ratio=1.5),
        dict(dt_rank=5), dict(conv_bias=True), dict(gate=True), dict(mlp_ratio=0.0),
        dict(mlp_ratio=2.0), dict(stem='patch'), dict(downsample='merge'), dict(conv_kernel=0),
        dict(conv_kernel=5), dict(conv_kernel=0, gate=True), dict(embed_dims=(8, 12, 16, 20)),
        dict(core='ssd'), dict(core='ssd', gate=True, conv_bias=True, ssm_ratio=2.0, dt_rank=4),
        dict(core='ssd', out_norm='none', conv_kernel=0), dict(core='ssd', out_norm='dwconv'),
        dict(core='ssd', out_norm='ln_dwconv', conv_kernel=5)],
    wrong=[
        (dict(stem='swin'), r"stem.*'patch' or 'conv'"),
        (dict(embed_dims=(8, 16, 24)), 'embed_dims.*or 4 of them'),
        (dict(embed_dims=(8, 16, 24, 33)), 'embed_dims.*an even int'),
        (dict(core='mamba2'), "core.*'s6' or 'ssd'"),
        (dict(core='ssd', scan='cascade'), "scan.*core='ssd'.*'cross' alone"),
        (dict(core='ssd', dt_rank=5), 'dt_rank.*5 in the stage of .*must divide'),
        (dict(core='ssd', out_norm='bn'), "out_norm.*'ln', 'none', 'dwconv'"),
        (dict(out_norm='none'), "out_norm.*core='ssd' alone"),
        (dict(core='s6', gate_act=False), "gate_act.*core='ssd' alone"),
        (dict(scan='zigzag'), "scan='zigzag' does not exist.*'cross', 'unidirectional'"),
        (dict(scan=4), "scan.*a str, such as 'cross'"), (dict(depths=(1, 1, 1)), '4 ints'),
        (dict(gate=1), 'True or False'), (dict(dt_rank='full'), "'auto' or an int"),
        (dict(act='tanh'), "act.*'silu', 'gelu' or 'relu'"),
        (dict(conv_kernel=2), 'conv_kernel.*0 .no convolution. or an odd int'),
        (dict(conv_kernel=None), 'conv_kernel'),
        (dict(ssm_init='ones'), "ssm_init.*'mamba', 'random' or 'zero'"),
        (dict(mlp_ratio=0.01), 'mlp_ratio.*no channel.*at least 1/.*0 for no MLP'),
        (dict(ssm_ratio=0.01), 'ssm_ratio.*no channel.*at least 1/'),
        (dict(mlp_ratio=float('inf')), 'mlp_ratio.*a number')],
    official=lambda model: [dense_state(model, generation, linear_4d, prefix='')
                            for generation in (2, 1) for linear_4d in (False, True)],
    official_classifiers=lambda model, classes: [
        classifier_state(model, classes, generation, linear_4d)
        for generation in (2, 1) for linear_4d in (False, True)],
    layer_depths={
        'patch_embed.conv1.weight': 0, 'stages.0.blocks.0.ssm.Ds': 1,
        'stages.0.downsample.conv.weight': 1, 'stages.2.blocks.1.norm1.weight': 4,
        'stages.3.blocks.0.mlp.fc1.bias': 5, 'norm3.weight': 6},
    a_weight='stages.2.blocks.1.ssm.out_proj.weight')
