"""U-Mamba: names and counts of the public code, sizes, tokens, and the contract of a module."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from official import listed_keys, shared
from safetensors.torch import save_model
from torch import nn

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.u_mamba import ARCHS, arch_of_plan, reduced_depths, token_widths
from vmamba_mm.models import UMamba
from vmamba_mm.models.u_mamba import MambaLayer
from vmamba_mm.registry import MODELS

_TWO = dict(features_per_stage=(4, 6, 8), kernel_sizes=((3, 3),) * 3,
            strides=((1, 1), (2, 2), (2, 1)), n_conv_per_stage=(2, 1, 1),
            n_conv_per_stage_decoder=(2, 1))
_THREE = dict(features_per_stage=(4, 6, 14), kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
              strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), n_conv_per_stage=(2, 2, 1),
              n_conv_per_stage_decoder=(1, 2))
SMALL = {
    'bot_2d': (dict(_TWO, variant='bot'), (16, 8)),
    'enc_2d': (dict(_TWO, variant='enc', input_size=(8, 4)), (8, 4)),
    'enc_2d_any': (dict(_TWO, variant='enc'), (8, 6)),
    'bot_3d': (dict(_THREE, variant='bot'), (4, 8, 12)),
    'enc_3d': (dict(_THREE, variant='enc', input_size=(4, 8, 12)), (4, 8, 12)),
}
each_small = pytest.mark.parametrize('arch, size', SMALL.values(), ids=SMALL)
#: Parameters with the classes and channels of the paper's data, counted from the public code.
COUNTS = {
    'bot_abdomen': (14, 1, 41945158), 'enc_abdomen_ct': (14, 1, 42842798),
    'enc_abdomen_mr': (14, 1, 42842798), 'bot_endoscopy': (8, 3, 47524592),
    'enc_endoscopy': (8, 3, 47680592), 'bot_microscopy': (3, 3, 64797301),
    'enc_microscopy': (3, 3, 64014261)}
LISTED = {
    'bot_abdomen': 'AbdomenCT 3d Bot', 'enc_abdomen_ct': 'AbdomenCT 3d Enc',
    'enc_abdomen_mr': 'AbdomenMR 3d Enc', 'bot_endoscopy': 'Endoscopy 2d Bot',
    'enc_endoscopy': 'Endoscopy 2d Enc', 'bot_microscopy': 'Microscopy 2d Bot',
    'enc_microscopy': 'Microscopy 2d Enc'}


def random_model(arch, num_classes=3, in_channels=2, **kwargs):
    torch.manual_seed(0)
    model = UMamba(arch, num_classes, in_channels, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def volume(size, batch=2, channels=2):
    torch.manual_seed(1)
    return torch.randn(batch, channels, *size)


# --- names --------------------------------------------------------------------------------------

def aliases(names):
    """{second name: first name}, written out from the public code."""
    blocks = {}
    for name in names:
        if found := re.fullmatch(r'(.*\.[1-9]\d*\.conv[12])\.(conv|norm)\.(weight|bias)', name):
            blocks[f'{found[1]}.all_modules.{int(found[2] == "norm")}.{found[3]}'] = name
    inner = {**{name: name for name in names}, **blocks}
    outer = {f'decoder.{name}': first for name, first in inner.items() if
             name.startswith('encoder.')}
    return {**blocks, **outer}


@pytest.mark.parametrize('arch', ARCHS)
def test_names_and_shapes_are_those_of_the_public_code(arch):
    num_classes, in_channels, count = COUNTS[arch]
    with torch.device('meta'):
        model = UMamba(arch, num_classes, in_channels)
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == count
    assert set(model.state_dict()) == set(shapes) | set(aliases(shapes))
    told = 'enc_abdomen_ct' if arch == 'enc_abdomen_mr' else arch  # the same sizes of weights
    assert infer_arch(model.state_dict()) == told
    listed = listed_keys('u_mamba', LISTED)
    if listed is not None:  # in the order that an optimizer's state goes by
        assert list(shapes.items()) == list(listed[arch].items())


@each_small
def test_second_names_are_of_the_same_weights(arch, size):
    state = random_model(arch).state_dict()
    second = aliases([k for k in state if 'all_modules' not in k
                      and not k.startswith('decoder.encoder.')])
    assert len(second) > 40 and all(state[k] is not None and
                                    state[k].data_ptr() == state[v].data_ptr()
                                    for k, v in second.items())


@each_small
def test_files_have_each_weight_once_or_by_all_its_names(arch, size, tmp_path):
    model, x = random_model(arch), volume(size)
    expected, state = model(x), model.state_dict()
    second = set(aliases([k for k in state if 'all_modules' not in k
                          and not k.startswith('decoder.encoder.')]))
    states = {'all': state, 'first': {k: v for k, v in state.items() if k not in second},
              'module': {f'module.{k}': v for k, v in state.items()}}
    for name, given in states.items():
        assert family_of(given).model == 'UMamba'
        path = tmp_path / f'{name}.pth'
        torch.save(dict(network_weights=given, optimizer_state={}, current_epoch=1000,
                        init_args=dict(device=torch.device('cpu'))), path)
        again = MODELS.build(dict(
            type='vmamba_mm.UMamba', arch=arch, num_classes=3, in_channels=2,
            init_cfg=dict(type='Pretrained', checkpoint=str(path))))
        again.init_weights()
        assert torch.equal(again(x), expected), name
    save_model(model, str(tmp_path / 'once.safetensors'))  # keeps one name of each, any
    again = UMamba(arch, 3, 2)
    again.load_pretrained(str(tmp_path / 'once.safetensors'))
    assert torch.equal(again(x), expected)
    again = UMamba(arch, 3, 2)
    again.load_state_dict(states['first'], assign=True)
    assert torch.equal(again(x), expected)
    assert again.encoder.stem is again.decoder.encoder.stem


def test_a_file_of_the_public_code():
    path = shared('parity/u_mamba/enc_2d.pth')
    kwargs = json.loads(path.with_suffix('.json').read_text())['kwargs']
    arch = arch_of_plan('enc', patch_size=kwargs['input_size'], **{k: kwargs[k] for k in (
        'features_per_stage', 'kernel_sizes', 'strides', 'n_conv_per_stage',
        'n_conv_per_stage_decoder')})
    model = UMamba(arch, kwargs['num_classes'], kwargs['input_channels'])
    held = read_checkpoint(path)['state_dict']
    assert list(held) == [f'backbone.{k}' for k in model.state_dict()]
    model.load_pretrained(str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, held[f'backbone.{key}'])


def test_wrong_files_are_refused_in_one_line():
    arch, _ = SMALL['enc_3d']
    model = random_model(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = model.state_dict()
    key = 'encoder.stages.0.1.conv1.conv.weight'
    with pytest.raises(UserError, match=rf'{re.escape(key)} and .* two names of one weight') as err:
        model.load_state_dict({**state, key: state[key] + 1})
    assert '\n' not in str(err.value)
    with pytest.raises(UserError, match='decoder.seg_layers.1.bias is missing'):
        model.load_state_dict({k: v for k, v in state.items() if k != 'decoder.seg_layers.1.bias'})
    other = random_model(dict(arch, n_conv_per_stage=(2, 2, 2))).state_dict()
    with pytest.raises(UserError, match='encoder.stages.2.1.conv1.conv.weight is not in the model'):
        model.load_state_dict(other)
    with pytest.raises(UserError, match=r'decoder.seg_layers.0.weight is \(4, 6, 1, 1, 1\), in the '
                                        r'model \(3, 6, 1, 1, 1\)'):
        model.load_state_dict(random_model(arch, num_classes=4).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each_small
def test_arch_from_weights(arch, size):
    """Strides and the sides of maps leave no trace, but the widths of tokens do."""
    model = random_model(arch)
    told = infer_arch(model.state_dict())
    for key in arch:
        if key not in ('strides', 'input_size'):
            assert told[key] == arch[key], key
    assert UMamba.arguments_of(model.state_dict()) == dict(in_channels=2, num_classes=3)
    built = UMamba(told, 3, 2).state_dict()
    if arch['strides'] == told['strides']:
        assert {k: v.shape for k, v in built.items()} == {
            k: v.shape for k, v in model.state_dict().items()}


# --- what is built ------------------------------------------------------------------------------

def test_a_plan_has_more_blocks_than_are_built():
    assert reduced_depths([2, 2, 2, 2, 2, 2], 2, 6) == ((2, 2, 2, 1, 1, 1), (2, 2, 2, 1, 1))
    assert reduced_depths(3, [3, 2, 2, 4], 5) == ((3, 3, 3, 1, 1), (3, 2, 2, 1))
    plan = [2, 2, 2, 2]
    reduced_depths(plan, plan[:3], 4)
    assert plan == [2, 2, 2, 2]


def test_tokens_are_channels_where_these_are_more():
    def channels(arch):
        return {i: layer for i, layer in enumerate(token_widths(ARCHS[arch])) if layer is not None}

    assert channels('enc_abdomen_ct') == {
        0: (32, False), 1: (64, False), 2: (128, False), 3: (256, False), 4: (320, False),
        5: (210, True)}
    assert channels('enc_endoscopy') == {0: (32, False), 2: (128, False), 4: (512, False),
                                         6: (60, True)}
    assert channels('enc_microscopy') == {1: (64, False), 3: (256, False), 5: (256, True),
                                          7: (16, True)}
    assert channels('bot_endoscopy') == {6: (512, False)}


def by_hand(layer, x):
    """A layer as the public code has it, on each token in turn."""
    batch, channels = x.shape[:2]
    tokens = x.reshape(batch, channels, -1)
    if not layer.channel_token:
        tokens = tokens.transpose(1, 2)
    m = layer.mamba
    a, out = -m.A_log.exp(), []
    xz = F.layer_norm(tokens, tokens.shape[-1:], layer.norm.weight, layer.norm.bias) \
        @ m.in_proj.weight.T
    u, z = xz.chunk(2, dim=-1)
    padded = F.pad(u, (0, 0, 3, 0))
    h = torch.zeros(batch, *a.shape, dtype=x.dtype)
    for i in range(u.shape[1]):
        ui = F.silu((padded[:, i:i + 4] * m.conv1d.weight[:, 0].T).sum(1) + m.conv1d.bias)
        dt, b, c = (ui @ m.x_proj.weight.T).split([m.dt_rank, 16, 16], -1)
        dt = F.softplus(dt @ m.dt_proj.weight.T + m.dt_proj.bias)
        h = (dt[..., None] * a).exp() * h + (dt * ui)[..., None] * b[:, None]
        y = (h * c[:, None]).sum(-1) + m.D * ui
        out.append((y * F.silu(z[:, i])) @ m.out_proj.weight.T)
    y = torch.stack(out, 1)
    return (y if layer.channel_token else y.transpose(1, 2)).reshape(x.shape)


@pytest.mark.parametrize('shape', [(2, 5, 3, 4), (1, 5, 2, 3, 2)])
@pytest.mark.parametrize('channel_token', [False, True])
def test_the_layer_by_hand(shape, channel_token):
    torch.manual_seed(0)
    layer = MambaLayer(12 if channel_token else 5, channel_token).double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-9, atol=1e-11)
    strided = x.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(layer(strided), layer(x))


@each_small
def test_sizes_and_gradients(arch, size):
    model, x = random_model(arch, deep_supervision=True).train(), volume(size)
    maps = model(x)
    strides = torch.tensor(arch['strides']).cumprod(0)[:-1]
    assert [tuple(y.shape) for y in maps] == [
        (2, 3, *(n // int(s) for n, s in zip(size, stride, strict=True))) for stride in strides]
    sum(y.square().sum() for y in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.decoder.deep_supervision = False  # as nnU-Net does for prediction
    assert torch.equal(model(x), maps[0])


def test_full_resolution_has_a_skip_in_volumes_alone():
    decoder = random_model(SMALL['bot_2d'][0]).decoder
    assert [stage[0].conv1.in_channels for stage in decoder.stages] == [12, 4]
    decoder = random_model(SMALL['bot_3d'][0]).decoder
    assert [stage[0].conv1.in_channels for stage in decoder.stages] == [12, 8]


def test_initial_weights():
    """He's, of images' and volumes' convolutions; Mamba keeps its own."""
    torch.manual_seed(0)
    model = UMamba(dict(_THREE, variant='bot', features_per_stage=(16, 32, 64)), 3)
    conv = model.encoder.stages[2][0].conv2
    fan_in = conv.weight[0].numel()
    assert conv.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.05)
    assert not conv.bias.any() and not model.decoder.seg_layers[0].bias.any()
    mixer = model.mamba_layer.mamba
    assert mixer.conv1d.bias.any() and torch.equal(mixer.D, torch.ones(128))
    torch.testing.assert_close(mixer.A_log[5], torch.arange(1.0, 17).log())
    dt = F.softplus(mixer.dt_proj.bias)
    assert 0.0009 < dt.min() and dt.max() < 0.11


@pytest.mark.gpu
@each_small
def test_on_a_gpu(arch, size):
    """In fp32 as on a CPU, and under autocast near it; gradients too."""
    model, x = random_model(arch, deep_supervision=True).train(), volume(size)
    grads = {}
    for name, dtype in (('cpu', None), ('cuda', None), ('half', torch.float16)):
        twin = copy.deepcopy(model).to('cpu' if name == 'cpu' else 'cuda')
        twin = twin if dtype else twin.double()
        given = x.to(next(twin.parameters()))
        with torch.autocast('cuda', dtype or torch.float16, enabled=dtype is not None):
            maps = twin(given)
        sum(y.double().square().mean() for y in maps).backward()
        grads[name] = torch.cat([y.double().flatten().cpu() for y in maps]
                                + [p.grad.double().flatten().cpu() for p in twin.parameters()])
    scale = grads['cpu'].norm()
    assert (grads['cuda'] - grads['cpu']).norm() < 1e-9 * scale
    assert (grads['half'] - grads['cpu']).norm() < 0.25 * scale


# --- wrong values -------------------------------------------------------------------------------

@pytest.mark.parametrize('change, match', [
    (dict(variant='mid'), "variant'.*'bot' or 'enc'"),
    (dict(features_per_stage=()), 'features_per_stage.*ints of at least 1'),
    (dict(kernel_sizes=((2, 3, 3),) * 3), 'kernel_sizes.*2 or 3 odd ints'),
    (dict(strides=((1,), (2,), (2,))), 'strides.*2 or 3 ints of at least 1'),
    (dict(strides=((1, 1, 1), (2, 2, 2))), "'strides'. has 2 entries and must have 3"),
    (dict(n_conv_per_stage_decoder=(1, 1, 1)), 'decoder.. has 3 entries and must have 2'),
    (dict(kernel_sizes=((3, 3),) * 3), 'all be of images .2 ints. or all of volumes'),
    (dict(input_size=(4, 8)), 'all be of images .2 ints. or all of volumes'),
    (dict(input_size=(4, 8, 10)), r'\(4, 8, 10\) must be multiples of .*\(2, 4, 4\)'),
    (dict(variant='bot'), "input_size.* is an option of the variant 'enc'"),
    (dict(d_state=8), "unknown keys .'d_state'."),
])
def test_wrong_archs(change, match):
    with pytest.raises(ValueError, match=match):
        UMamba({**SMALL['enc_3d'][0], **change}, 3)


def test_wrong_arguments_and_sizes():
    with pytest.raises(ValueError, match='num_classes must be an int of at least 1, got 0'):
        UMamba('bot_abdomen', 0)
    with pytest.raises(ValueError, match="arch='bot' does not exist; choose one of .'bot_abdomen'"):
        UMamba('bot', 2)
    arch, size = SMALL['enc_3d']
    model = random_model(arch)
    with pytest.raises(ValueError, match=r'size \(4, 8, 12\) alone.*got \(8, 8, 12\): use a slid'):
        model(volume((8, 8, 12)))
    model = random_model(SMALL['bot_2d'][0])
    for size in ((6, 8), (8, 7), (4, 8, 8)):
        with pytest.raises(ValueError, match=rf'multiples of \(4, 2\).*got {re.escape(str(size))}'):
            model(volume(size))


def test_lists_of_a_config():
    arch, size = SMALL['enc_3d']
    listed = json.loads(json.dumps(arch))
    assert UMamba(listed, 3).arch == UMamba(arch, 3).arch == arch


# --- the contract of a module -------------------------------------------------------------------

def test_the_mixer_runs_in_the_dtype_of_its_weights():
    """In fp32 under autocast, which the public code asks for; in bf16 where the weights are."""
    arch, size = SMALL['enc_3d']
    model, x, seen = random_model(arch), volume(size), []
    for module in model.modules():
        if isinstance(module, MambaLayer):
            module.mamba.register_forward_hook(
                lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert set(seen) == {(torch.float32, torch.float32)} and len(seen) == 3
    reference = model(x)  # norms of a few positions make much of every rounding
    assert (y.float() - reference).norm() < 0.4 * reference.norm()
    seen.clear()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert {dtype for pair in seen for dtype in pair} == {torch.bfloat16}


@each_small
def test_checkpointing_changes_nothing(arch, size):
    x, up = volume(size), torch.randn(2, 3, *size)
    grads = []
    for with_cp in (False, True):
        model = random_model(arch, with_cp=with_cp).train()
        (model(x) * up).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_on_every_module():
    """Also where an activation would be in place; and every module but second names is called."""
    arch, size = SMALL['enc_3d']
    model, x, called = random_model(arch).double(), volume(size).double(), set()
    x.requires_grad_()
    expected = model(x)
    kinds = (nn.Conv3d, nn.InstanceNorm3d, nn.LayerNorm, nn.Linear, nn.Conv1d)
    leaves = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in leaves.items():
        module.register_forward_hook(lambda *args, name=name: called.add(name))
        module.register_full_backward_hook(lambda *args, name=name: called.add(f'{name} back'))
    model.decoder.deep_supervision = True
    maps = model(x)
    torch.testing.assert_close(maps[0], expected)
    sum(y.square().sum() for y in maps).backward()
    missing = {f'{name}{end}' for name in leaves for end in ('', ' back')} - called
    # The step size's bias is added in fp32, by the scan.
    assert {name.rpartition('.')[2] for name in missing} <= {'dt_proj', 'dt_proj back'}


def test_copies_have_second_names_of_their_own():
    arch, size = SMALL['bot_3d']
    model = random_model(arch)
    twin = copy.deepcopy(model)
    assert twin.decoder.encoder is twin.encoder and twin.encoder is not model.encoder
    assert torch.equal(twin(volume(size)), model(volume(size)))


def test_export():
    arch, size = SMALL['bot_3d']
    model, x = random_model(arch), volume(size)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-4)


def test_compile_is_one_graph():
    arch, size = SMALL['enc_2d']
    model, x = random_model(arch), volume(size)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
