"""MambaIR and MambaIRv2: names and counts of the public code, files, sizes, routes of tokens."""

import copy
import functools
import json
import re

import pytest
import torch
from official import SHARED
from torch import nn

from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.errors import UserError
from vmamba_mm.families import FAMILIES, family_of
from vmamba_mm.models import MambaIR, MambaIRUNet, MambaIRv2
from vmamba_mm.models.mambair_v2 import mirror_to_multiple, relative_positions, shift_mask
from vmamba_mm.registry import MODELS

CLASSES = dict(mambair=MambaIR, mambair_v2=MambaIRv2, mambair_unet=MambaIRUNet)
_V1 = dict(embed_dims=30, depths=(2, 1), d_state=2, ssm_ratio=1.2, cab='full',
           resi_connection='1conv', upsampler='pixelshuffle', upscale=2)
_V2 = dict(embed_dims=12, depths=(2, 1), num_heads=(3, 2), d_state=2, window_size=4, inner_rank=3,
           num_tokens=5, mlp_ratio=2.0, ffn='conv', conv_kernel=3, resi_connection='1conv',
           upsampler='pixelshuffle', upscale=2)
_LIGHT = dict(upsampler='pixelshuffledirect', upscale=3)
#: family, arch, channels of the image
SMALL = {
    'sr': ('mambair', _V1, 3), 'sr_x3': ('mambair', dict(_V1, upscale=3), 3),
    'sr_x8': ('mambair', dict(_V1, upscale=8, resi_connection='3conv'), 3),
    'grey': ('mambair', dict(_V1, upsampler='', upscale=1, depths=(1,)), 1),
    'real': ('mambair', dict(_V1, upsampler='nearest+conv', upscale=4, depths=(1,)), 3),
    **{cab: ('mambair', dict(_V1, cab=cab, **_LIGHT), 3)
       for cab in ('light', 'light_2024_03', 'light_2024_02')},
    'v2': ('mambair_v2', _V2, 3),
    'v2_light': ('mambair_v2', dict(_V2, ffn='gated', conv_kernel=5, mlp_ratio=1.0, **_LIGHT), 3),
    'v2_grey': ('mambair_v2', dict(_V2, upsampler='', upscale=1), 1),
    'unet': ('mambair_unet', dict(embed_dims=30, depths=(1, 1, 1, 2), refinement_depth=1, d_state=2,
                                  ssm_ratio=1.5), 3)}
each_small = pytest.mark.parametrize('name', SMALL)
few_small = pytest.mark.parametrize('name', ['light', 'v2', 'unet'])

#: (family, arch): channels, parameters counted from the public code, and its name in the list
PUBLISHED = {
    **{('mambair', f'sr_x{n}'): (3, count, f'MambaIR_SR_x{n}') for n, count in (
        (2, 20421863), (3, 20606503), (4, 20569575))},
    **{('mambair', f'light_x{n}'): (3, count, f'MambaIR_lightSR_x{n}') for n, count in (
        (2, 905016), (3, 913131), (4, 924492))},
    ('mambair', 'light_x2_2024_03'): (3, 1363320, None),
    ('mambair', 'denoise'): (3, 15777507, 'MambaIR_ColorDN'),
    **{('mambair_v2', f'{size}_x{n}'): (3, counts[n - 2], f'MambaIRv2_{listed}_x{n}')
       for size, listed, counts in (
        ('small', 'SRSmall', (9621935, 9806575, 9769647)),
        ('base', 'SR', (22903001, 23087641, 23050713)),
        ('large', 'SRLarge', (34090523, 34275163, 34238235)),
        ('light', 'lightSR', (774092, 780587, 789680))) for n in (2, 3, 4)},
    ('mambair_v2', 'denoise'): (3, 22657971, 'MambaIRv2_ColorDN'),
    ('mambair_unet', 'real_denoise'): (3, 26779480, 'MambaIR_RealDN_UNet')}
GREY = {'mambair': (15771025, 'MambaIR_CAR'), 'mambair_v2': (22651705, 'MambaIRv2_CAR')}


def random_model(name, **kwargs):
    family, arch, channels = SMALL[name]
    torch.manual_seed(0)
    model = CLASSES[family](arch, channels, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(name, height=16, width=8, batch=2):
    torch.manual_seed(1)
    return torch.rand(batch, SMALL[name][2], height, width)


@functools.cache
def published(family, arch, channels=3):
    with torch.device('meta'):
        arch = arch if isinstance(arch, str) else dict(arch)
        return CLASSES[family](arch, channels).state_dict()


# --- names --------------------------------------------------------------------------------------

def first_block(name):
    """The list has the first group's first block alone."""
    name = re.sub(r'^layers\.\d+\.', 'layers.0.', name)
    name = re.sub(r'\.(blocks|layers)\.\d+\.', r'.\1.0.', name)
    return re.sub(r'^((?:en|de)coder_level\d|latent|refinement)\.\d+\.', r'\1.0.', name)


#: Those for other scales differ in the last layers alone.
OF_ONE_SCALE = {key: value for key, value in PUBLISHED.items() if key[1][-3:] not in ('_x3', '_x4')}


@pytest.mark.parametrize('family, arch, channels, count, listed', [
    *((*key, *value) for key, value in OF_ONE_SCALE.items()),
    *((family, 'denoise', 1, *value) for family, value in GREY.items())])
def test_names_and_shapes_are_those_of_the_public_code(family, arch, channels, count, listed):
    state = published(family, arch, channels)
    assert parameters_of(state) == count
    assert infer_arch(state) == arch
    assert CLASSES[family].arguments_of(state) == dict(in_channels=channels)
    check_listed(state, listed)


@pytest.mark.parametrize('family, arch', sorted(set(PUBLISHED) - set(OF_ONE_SCALE)))
def test_the_same_for_other_scales(family, arch):
    """With one block; the others are those for x2."""
    at_two = f'{arch[:-1]}2'
    states = []
    for name in (arch, at_two):
        settings = FAMILIES[family].archs[name]
        heads = dict(num_heads=settings['num_heads'][:1]) if 'num_heads' in settings else {}
        states.append(published(family, tuple(dict(settings, depths=(1,), **heads).items())))
    state, two = states
    _, count, listed = PUBLISHED[family, arch]
    assert parameters_of(state) - parameters_of(two) == count - PUBLISHED[family, at_two][1]
    told, settings = infer_arch(state), FAMILIES[family].archs[arch]
    assert all(told[key] == settings[key] for key in settings if key not in ('depths', 'num_heads'))
    check_listed(state, listed)


@pytest.mark.parametrize('family, arch', [
    ('mambair', 'light_x2_2024_02'), ('mambair', 'real_sr_x4'), ('mambair_v2', 'real_sr_x4')])
def test_other_architectures_are_told_from_their_weights(family, arch):
    assert infer_arch(published(family, arch)) == arch


def parameters_of(state):
    return sum(v.numel() for v in state.values() if v.is_floating_point())


def check_listed(state, listed):
    path = SHARED / 'facts/keys/mambair.json'
    if listed is not None and path.is_file():
        keys = json.loads(path.read_text())[listed]['keys']
        ours = {first_block(k): tuple(v.shape) for k, v in state.items()}
        assert ours == {k: tuple(shape) for k, shape in keys.items()}


@each_small
def test_arch_from_weights(name):
    family, arch, channels = SMALL[name]
    state = random_model(name).state_dict()
    assert family_of(state) is FAMILIES[family]
    assert infer_arch(state) == arch
    assert CLASSES[family].arguments_of(state) == dict(in_channels=channels)


@few_small
def test_files_of_the_public_code(name, tmp_path):
    family, arch, channels = SMALL[name]
    model, x = random_model(name), images(name)
    expected, state = model(x), model.state_dict()
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    contents = {
        'params': dict(params=state), 'ema': dict(params=zeros, params_ema=state), 'bare': state,
        'module': dict(params={f'module.{k}': v for k, v in state.items()})}
    for which, content in contents.items():
        path = tmp_path / f'{which}.pth'
        torch.save(content, path)
        again = MODELS.build(dict(
            type=f'vmamba_mm.{CLASSES[family].__name__}', arch=arch, in_channels=channels,
            init_cfg=dict(type='Pretrained', checkpoint=str(path)))).eval()
        again.init_weights()
        assert torch.equal(again(x), expected), which


def test_generations_are_not_mistaken_for_one_another():
    models = {cab: random_model(cab) for cab in ('light', 'light_2024_03', 'light_2024_02')}
    for cab, model in models.items():
        for other, loaded in models.items():
            if other != cab:
                with pytest.raises(UserError, match='cab') as err:
                    model.load_state_dict(loaded.state_dict())
                assert '\n' not in str(err.value)


def test_wrong_files_are_refused_in_one_line():
    model = random_model('v2')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = model.state_dict()
    with pytest.raises(UserError, match='conv_last.bias is missing'):
        model.load_state_dict({k: v for k, v in state.items() if k != 'conv_last.bias'})
    with pytest.raises(UserError, match='conv_first.weight'):
        model.load_state_dict(MambaIRv2(_V2, 1).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what is built ------------------------------------------------------------------------------

@each_small
def test_sizes_and_gradients(name):
    kwargs = {} if name.startswith('v2') else dict(drop_path_rate=0.1)
    model = random_model(name, **kwargs).train()
    x = images(name, 8, 16).requires_grad_()
    y = model(x)
    assert y.shape == (2, x.shape[1], 8 * model.scale, 16 * model.scale)
    y.square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # A ReLU of a single channel may be off.
        assert parameter.grad.any() or '.attention.' in key, key


@pytest.mark.parametrize('size', [(1, 1), (1, 9), (3, 17)])
@pytest.mark.parametrize('name', ['sr_x3', 'v2_light'])
def test_any_size(name, size):
    model, x = random_model(name), images(name, *size)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 3, 3 * size[0], 3 * size[1]) and y.isfinite().all()
        for i in range(2):
            torch.testing.assert_close(model(x[i:i + 1]), y[i:i + 1], rtol=1e-4, atol=1e-5)


@few_small
def test_gradient_checkpointing_changes_nothing(name):
    x, grads = images(name), []
    for with_cp in (False, True):
        model = random_model(name, with_cp=with_cp).train()
        torch.manual_seed(2)  # of the routes' noise
        model(x).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@few_small
def test_half_precision(name):
    """Under autocast, and with weights in it, near fp32."""
    model, x = random_model(name), images(name)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            y = model(x)
        assert (y - expected).norm() < 0.1 * expected.norm()
        z = copy.deepcopy(model).bfloat16()(x.bfloat16())
        assert z.dtype == torch.bfloat16 and (z - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize('name', ['grey', 'v2'])
def test_compile_is_one_graph(name):
    model, x = random_model(name), images(name)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_the_shift_of_colours_follows_the_model_and_is_in_no_file():
    model = random_model('sr')
    assert 'mean' not in model.state_dict()
    assert model.double().mean.dtype == torch.float64
    for module in model.modules():  # without a body, the image that is left is the mean
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    y = model(torch.rand(1, 3, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(y, model.mean.expand(1, 3, 8, 8))
    assert not random_model('grey').mean.any()


def test_the_range_of_values():
    """The same weights restore the same image, of another range, if the first convolution knows."""
    torch.manual_seed(0)
    model = MambaIR(SMALL['grey'][1], 1).eval()
    other = MambaIR(SMALL['grey'][1], 1, img_range=255.0).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.conv_first.weight.div_(255)
        other.conv_last.weight.mul_(255)
        other.conv_last.bias.mul_(255)
        x = images('grey')
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    model = MambaIR(dict(_V1, embed_dims=90))
    block = model.layers[0].residual_group['blocks'][0]
    assert block.self_attention.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(block.skip_scale, torch.ones(90))
    layer = MambaIRv2(_V2).layers[0].residual_group['layers'][0]
    assert torch.equal(layer.scale1, torch.full((12,), 1e-4))
    torch.testing.assert_close(layer.assm.selectiveScan.A_logs[3].exp(), torch.tensor([1.0, 2.0]))
    assert layer.embeddingA.weight.abs().max() <= 1 / 3


# --- routes and windows of MambaIRv2 --------------------------------------------------------------

def test_routes_are_random_in_training_alone_unless_asked():
    x = images('v2')
    model = random_model('v2')
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert not torch.equal(model.train()(x), model(x))
        always, never = (random_model('v2', routing_noise=mode) for mode in ('always', 'never'))
        assert not torch.equal(always(x), always(x))
        assert torch.equal(never.train()(x), never(x))


def test_noise_can_be_given():
    model, x = random_model('v2'), images('v2', 5, 6)
    zeros = [torch.zeros(2, 8 * 8, 5) for _ in range(3)]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(x, noise=zeros), expected)
        routes = [zeros[0], 100 * torch.randn(2, 8 * 8, 5), zeros[2]]  # of the second layer
        assert not torch.allclose(model(x, noise=routes), expected)
        assert torch.equal(model.train()(x, noise=zeros), model(x, noise=zeros))
    with pytest.raises(ValueError, match='a tensor for each of the 3 layers, got 2'):
        model(x, noise=zeros[:2])


def test_tokens_of_a_class_keep_their_order():
    """With one class the scan is that of the image's rows; another order is another result."""
    arch = dict(_V2, num_tokens=1)
    torch.manual_seed(0)
    stable = MambaIRv2(arch).eval()
    scan = stable.layers[0].residual_group['layers'][0].assm
    seen = []
    scan.selectiveScan.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    scan.in_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    scan.CPE.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        stable(torch.rand(1, 3, 8, 8))
    mapped, gates, tokens = seen
    torch.testing.assert_close(tokens, (mapped * gates.sigmoid()).flatten(2).transpose(1, 2))


def test_images_are_mirrored_with_their_border():
    x = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 2, 5)
    y = mirror_to_multiple(x, 4)
    assert y.shape == (1, 1, 4, 8)
    assert y[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 4, 3, 2]
    tiny = mirror_to_multiple(torch.tensor([[[[1.0, 2.0]]]]), 7)
    assert tiny[0, 0, 6].tolist() == [1, 2, 2, 1, 1, 2, 2]
    assert mirror_to_multiple(x[..., :4], 2) is not None
    assert torch.equal(mirror_to_multiple(x[..., :4], 2), x[..., :4])


def test_windows_by_hand():
    index = relative_positions(3)
    assert index.shape == (9, 9) and index[0, 0] == 12  # the middle of 25
    assert index[0, 8] == 0 and index[8, 0] == 24
    assert index[0, 1] == 11 and index[1, 0] == 13 and index[0, 3] == 7
    mask = shift_mask(4, 8, 4, 2, 'cpu')
    assert mask.shape == (2, 16, 16) and set(mask.unique().tolist()) == {-100.0, 0.0}
    first = mask[0].view(4, 4, 4, 4)  # the one row of windows is the last one too
    assert first[0, 0, 1, 3] == 0 and first[0, 0, 2, 0] == -100
    second = mask[1].view(4, 4, 4, 4)
    assert second[0, 0, 0, 1] == 0 and second[0, 0, 0, 2] == -100


# --- wrong values -------------------------------------------------------------------------------

@pytest.mark.parametrize('name, change, match', [
    ('sr', dict(embed_dims=28), 'embed_dims.*at least 30'),
    ('sr', dict(depths=()), 'depths.*ints of at least 1'),
    ('sr', dict(cab='heavy'), "cab.*'light_2024_03' or 'light_2024_02'"),
    ('sr', dict(upsampler='bicubic'), 'upsampler.*nearest'),
    ('sr', dict(upscale=5), "upscale.*=5 does not go with upsampler='pixelshuffle'.*2 or 3 or 4"),
    ('grey', dict(upscale=2), "upscale.*=2 does not go with upsampler=''.*must be 1"),
    ('sr', dict(window_size=8), "unknown keys .'window_size'."),
    ('v2', dict(num_heads=(3,)), 'num_heads.*an entry for each of the 2 groups'),
    ('v2', dict(num_heads=(3, 5)), 'num_heads.*must divide embed_dims=12'),
    ('v2', dict(conv_kernel=4), 'conv_kernel.*odd'),
    ('v2_light', dict(mlp_ratio=1.1), 'halves the 13 channels'),
    ('v2_light', dict(conv_kernel=3), "must be 5 with ffn='gated'"),
    ('unet', dict(depths=(1, 1, 1)), '4 ints'), ('unet', dict(embed_dims=31), 'an even int')])
def test_wrong_archs(name, change, match):
    family, arch, channels = SMALL[name]
    with pytest.raises(ValueError, match=match):
        CLASSES[family]({**arch, **change}, channels)


def test_wrong_arguments_and_images():
    with pytest.raises(ValueError, match='img_range must be a number above 0'):
        MambaIR(_V1, img_range=0)
    with pytest.raises(ValueError, match='in_channels must be an int'):
        MambaIR(_V1, in_channels=0)
    with pytest.raises(ValueError, match='drop_path_rate'):
        MambaIR(_V1, drop_path_rate=1.0)
    with pytest.raises(ValueError, match="routing_noise='no'.*'never'"):
        MambaIRv2(_V2, routing_noise='no')
    model = random_model('sr')
    with pytest.raises(ValueError, match=r'images \(B, 3, H, W\), got \(2, 1, 4, 4\): repeat'):
        model(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match='without pixels'):
        model(torch.rand(1, 3, 0, 4))
    with pytest.raises(ValueError, match=r'multiples of 8, got \(8, 12\): pad it'):
        random_model('unet')(torch.rand(1, 3, 8, 12))


@pytest.mark.gpu
@few_small
def test_on_a_gpu(name):
    """In fp32 as on a CPU, and under autocast near it; gradients too."""
    model, x = random_model(name), images(name)
    results = {}
    for which, dtype in (('cpu', None), ('cuda', None), ('half', torch.float16)):
        twin = copy.deepcopy(model).to('cpu' if which == 'cpu' else 'cuda')
        twin = twin if dtype else twin.double()
        with torch.autocast('cuda', dtype or torch.float16, enabled=dtype is not None):
            y = twin(x.to(next(twin.parameters())))
        y.double().square().mean().backward()
        results[which] = torch.cat([y.double().flatten().cpu()] + [
            p.grad.double().flatten().cpu() for p in twin.parameters()])
    scale = results['cpu'].norm()
    assert (results['cuda'] - results['cpu']).norm() < 1e-9 * scale
    if name != 'v2':  # where rounding may take another route
        assert (results['half'] - results['cpu']).norm() < 0.25 * scale
