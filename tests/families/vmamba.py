"""VMamba under the generic tests."""

import json

from official import S1, SHARED, VANILLA, classifier_state, dense_state
from specs import Spec

from vmamba_mm.families.vmamba import FAMILY
from vmamba_mm.models import VMamba

OTHER = dict(S1, d_state=2, act='relu', conv_kernel=0, gate=True, ssm_init='zero')


def _shapes(arch, height, width):
    up = arch['stem'] == 'conv'
    height, width = (-(-side // 4) if up else max(1, side // 4) for side in (height, width))
    shapes = []
    for i in range(4):
        shapes.append((arch['embed_dims'] * 2 ** i, height, width))
        height, width = -(-height // 2), -(-width // 2)
    return shapes


def _published_keys():
    path = SHARED / 'facts/official_keys.json'
    if path.is_file():
        return {name: {k: tuple(shape) for k, shape in model['keys'].items()}
                for name, model in json.loads(path.read_text()).items()}


SPEC = Spec(
    family=FAMILY, model=VMamba, archs=dict(s1=S1, vanilla=dict(VANILLA, d_state=4), other=OTHER),
    shapes=_shapes, published_keys=_published_keys,
    changes=[
        dict(embed_dims=12), dict(depths=(1, 2, 3, 4)), dict(d_state=3), dict(ssm_ratio=1.5),
        dict(dt_rank=5), dict(conv_bias=True), dict(gate=True), dict(mlp_ratio=0.0),
        dict(mlp_ratio=2.0), dict(stem='patch'), dict(downsample='merge'), dict(conv_kernel=0),
        dict(conv_kernel=5), dict(conv_kernel=0, gate=True)],
    wrong=[
        (dict(stem='swin'), r"stem.*'patch' or 'conv'"),
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
