"""DiS: its numbers, the shapes it takes, files of the public code, and what PyTorch asks of it.

The generic tests of families (tests/specs.py) feed images alone and ask for maps; what a model of
noise, times and classes has of that is tested here.
"""

import argparse
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from official import shared

from vmamba_mm import zoo
from vmamba_mm.checkpoints.names import infer_arch, to_mm, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.dis import ARCHS, FAMILY
from vmamba_mm.layers import mamba_blocks
from vmamba_mm.models import DiS
from vmamba_mm.models.dis import sinusoids
from vmamba_mm.registry import MODELS
from vmamba_mm.testing import DEVICES, relative_error

SMALL = dict(embed_dims=12, depth=4, patch_size=2, image_size=6, in_channels=3, num_classes=5,
             d_state=3)
PLAIN = dict(embed_dims=9, depth=3, patch_size=3, image_size=6, in_channels=4, num_classes=0,
             learn_sigma=False, skip=False, norm='ln', d_state=2, d_conv=3, expand=1, dt_rank=2)
each_small = pytest.mark.parametrize('arch', [SMALL, PLAIN], ids=['small', 'plain'])


def make(arch=SMALL, seed=0, **kwargs):
    """Every parameter is random, those that start as ones and zeros as well."""
    torch.manual_seed(seed)
    model = DiS(arch, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs_of(model, count=2, device='cpu', dtype=torch.float32):
    size = model.arch['image_size']
    x = torch.randn(count, model.in_channels, size, size, device=device, dtype=dtype)
    t = torch.tensor([3.5, 981, 0, 412.25][:count], device=device, dtype=dtype)
    labels = torch.tensor([1, 5, 0, 4][:count], device=device) if model.num_classes else None
    return x, t, labels


# --- numbers ------------------------------------------------------------------------------------

def by_hand(model, x, t, labels):
    """The model written out from the paper and the list of what the public code does."""
    w = {k: v.detach() for k, v in model.state_dict().items()}
    arch = model.arch
    dims, patch, side = arch['embed_dims'], arch['patch_size'], arch['image_size']
    is_rms = arch.get('norm', 'rms') == 'rms'

    def linear(x, name):
        return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))

    def norm(x, name):
        if is_rms:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f'{name}.weight']
        return F.layer_norm(x, (dims,), w[f'{name}.weight'], w[f'{name}.bias'])

    def direction(x, z, name, suffix):
        conv = w[f'{name}.conv1d{suffix}.weight']
        width = conv.shape[-1]
        u = F.silu(F.conv1d(F.pad(x.mT, (width - 1, 0)), conv, w[f'{name}.conv1d{suffix}.bias'],
                            groups=len(conv)).mT)
        A = -w[f'{name}.A{suffix}_log'].exp()
        rank = w[f'{name}.dt_proj{suffix}.weight'].shape[1]
        dt, B, C = linear(u, f'{name}.x_proj{suffix}').split([rank, A.shape[1], A.shape[1]], -1)
        dt = F.softplus(linear(dt, f'{name}.dt_proj{suffix}'))
        h, out = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
        for i in range(x.shape[1]):
            h = (dt[:, i, :, None] * A).exp() * h + (dt[:, i] * u[:, i])[..., None] * B[:, i, None]
            out.append((h * C[:, i, None]).sum(-1))
        return (torch.stack(out, 1) + w[f'{name}.D{suffix}'] * u) * F.silu(z)

    def mixer(x, name):
        x, z = linear(x, f'{name}.in_proj').chunk(2, -1)
        back = direction(x.flip(1), z.flip(1), name, '_b').flip(1)
        return linear(direction(x, z, name, '') + back, f'{name}.out_proj')

    half = dims // 2
    angles = t[:, None] * torch.tensor([math.exp(-math.log(10000) * i / half)
                                        for i in range(half)], dtype=x.dtype)
    wave = torch.cat([angles.cos(), angles.sin(), torch.zeros(len(x), dims % 2).to(x)], 1)
    time = linear(F.silu(linear(wave, 'time_embed.0')), 'time_embed.2')
    tokens = F.conv2d(x, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], patch)
    parts = [time[:, None], tokens.flatten(2).mT]
    condition = time
    if labels is not None:
        classes = w['label_emb.embedding_table.weight'][labels]
        parts.insert(0, classes[:, None])
        condition = time + classes
    hidden = torch.cat(parts, 1) + w['pos_embed']
    residual, skips, count = 0, [], arch['depth'] // 2
    names = [*(f'in_blocks.{i}' for i in range(count)), 'mid_block',
             *(f'out_blocks.{i}' for i in range(count))]
    for i, name in enumerate(names):
        if i > count and arch.get('skip', True):
            hidden = linear(torch.cat([hidden, skips.pop()], -1), f'{name}.skip_linear')
        residual = residual + hidden
        hidden = mixer(norm(residual, f'{name}.norm'), f'{name}.mixer')
        if i < count:
            skips.append(hidden)
    y = F.layer_norm(norm(residual + hidden, 'norm_f'), (dims,), eps=1e-6)
    if labels is not None:
        shift, scale = linear(F.silu(condition), 'final_layer.adaLN_modulation.1').chunk(2, 1)
        y = y * (1 + scale[:, None]) + shift[:, None]
    y = linear(y, 'final_layer.linear')[:, len(parts) - 1:]
    rows = side // patch
    y = y.reshape(len(x), rows, rows, patch, patch, -1)
    return torch.einsum('bhwpqc->bchpwq', y).reshape(len(x), -1, side, side)


@each_small
def test_the_noise_is_that_of_the_paper(arch):
    model = make(arch).double()
    x, t, labels = inputs_of(model, dtype=torch.float64)
    expected = by_hand(model, x, t, labels)
    assert expected.shape[1] == model.out_channels
    assert relative_error(model(x, t, labels), expected) < 1e-10
    assert relative_error(model.float()(x.float(), t.float(), labels), expected) < 1e-5


def test_sinusoids():
    assert torch.equal(sinusoids(torch.zeros(1), 5), torch.tensor([[1.0, 1, 0, 0, 0]]))
    waves = sinusoids(torch.tensor([2.5], dtype=torch.float64), 6)[0]
    expected = [math.cos(2.5), math.cos(2.5 * 10000 ** (-1 / 3)), math.cos(2.5 * 10000 ** (-2 / 3))]
    assert waves[:3].tolist() == pytest.approx(expected)


def test_one_time_for_all_images():
    model = make()
    x, _, labels = inputs_of(model)
    expected = model(x, torch.tensor([7, 7]), labels)
    assert torch.equal(model(x, 7, labels), expected)
    assert torch.equal(model(x, torch.tensor(7.0), labels), expected)


def test_guidance():
    model = make(dict(SMALL, in_channels=4))
    x, t, _ = inputs_of(model)
    both, classes, none = torch.cat((x, x)), torch.tensor([1, 2]), torch.tensor([5, 5])
    with_class, without = model(x, t, classes), model(x, t, none)
    times = torch.cat((t, t))
    for channels, count in ((3, 3), (None, 4)):
        out = model.forward_with_cfg(both, times, torch.cat((classes, none)), 2.5, channels)
        guided = without + 2.5 * (with_class - without)
        for i, own in enumerate((with_class, without)):
            half = out[2 * i:2 * i + 2]
            torch.testing.assert_close(half[:, :count], guided[:, :count], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(half[:, count:], own[:, count:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='guided_channels must be from 1 to 4'):
        model.forward_with_cfg(both, times, torch.cat((classes, none)), 2.5, 5)


# --- training -----------------------------------------------------------------------------------

@each_small
def test_every_parameter_has_a_gradient(arch):
    model = make(arch, drop_path_rate=0.0).train()
    x, t, labels = inputs_of(model, 4)
    model(x, t, labels).square().mean().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads.values())
    again = copy.deepcopy(model)
    for block in (*again.in_blocks, again.mid_block, *again.out_blocks):
        block.with_cp = True
    again.zero_grad()
    again(x, t, labels).square().mean().backward()
    for name, p in again.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-7)


def test_dropped_paths():
    """The rates grow from 0 to that of the last block, and of what comes after it."""
    for depth, rates in ((4, [0, 0, 0.1, 0.2, 0.3]), (5, [0, 0, 0.075, 0.15, 0.225])):
        model = DiS(dict(SMALL, depth=depth), drop_path_rate=0.3)
        blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
        assert [b.drop_input.drop_prob for b in blocks] == pytest.approx(rates)
        assert model.drop_path.drop_prob == 0.3
    model = make(drop_path_rate=0.9)
    x, t, labels = inputs_of(model)
    expected = model(x, t, labels)
    assert not torch.allclose(model.train()(x, t, labels), expected)
    assert torch.equal(model.eval()(x, t, labels), expected)


def test_initial_values():
    torch.manual_seed(0)
    model = DiS(dict(SMALL, embed_dims=64))
    state = model.state_dict()
    assert not state['pos_embed'].any()
    assert state['label_emb.embedding_table.weight'].std().item() == pytest.approx(0.02, rel=0.2)
    zeros = [k for k, v in state.items() if k.endswith('bias') and not v.any()]
    expected = ['time_embed.0', 'time_embed.2', 'final_layer.linear',
                'final_layer.adaLN_modulation.1', *(f'out_blocks.{i}.skip_linear' for i in (0, 1)),
                *(f'{block}.mixer.dt_proj_b' for block in (
                    'in_blocks.0', 'in_blocks.1', 'mid_block', 'out_blocks.0', 'out_blocks.1'))]
    assert sorted(zeros) == sorted(f'{name}.bias' for name in expected)
    bound = 1 / math.sqrt(128) / math.sqrt(4)  # fan-in, and the depth
    largest = state['mid_block.mixer.out_proj.weight'].abs().max().item()
    assert 0.9 * bound < largest <= bound
    assert state['final_layer.linear.weight'].any()  # others begin with zeros


@pytest.mark.parametrize('device', DEVICES)
@each_small
def test_devices_and_half_precision(device, arch):
    model = make(arch)
    x, t, labels = inputs_of(model)
    with torch.no_grad():
        expected = model(x, t, labels)
        on = copy.deepcopy(model).to(device)
        moved = [None if v is None else v.to(device) for v in (x, t, labels)]
        assert relative_error(on(*moved).cpu(), expected) < (5e-3 if device == 'cuda' else 1e-6)
        with torch.autocast(device, torch.bfloat16):
            assert relative_error(on(*moved).float().cpu(), expected) < 5e-2
        half = on.to(torch.bfloat16)(moved[0].bfloat16(), *moved[1:])
    assert half.dtype == torch.bfloat16 and relative_error(half.float().cpu(), expected) < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize('norm', ['rms', 'ln'])
def test_a_step_under_autocast_on_a_gpu_is_that_of_the_cpu(norm, monkeypatch):
    """All blocks but the first run as one op each there."""
    model = make(dict(SMALL, embed_dims=32, d_state=16, norm=norm))
    x, t, labels = inputs_of(model)
    grads, calls, op = {}, [], mamba_blocks.mamba_block
    monkeypatch.setattr(mamba_blocks, 'mamba_block', lambda *args: calls.append(1) or op(*args))
    for device in ('cpu', 'cuda'):
        net = copy.deepcopy(model).to(device).train()
        moved = [v.to(device) for v in (x, t, labels)]
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            loss = net(*moved).float().square().mean()
        loss.backward()
        grads[device] = {k: p.grad.cpu() for k, p in net.named_parameters()}
    assert len(calls) == SMALL['depth']
    for name, grad in grads['cpu'].items():
        assert relative_error(grads['cuda'][name], grad) < 0.1, name


def test_it_compiles():
    model = make()
    arguments = inputs_of(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments), rtol=1e-5, atol=1e-6)


# --- published models ---------------------------------------------------------------------------

#: Of latents of ImageNet at 256 pixels, and of CIFAR-10 without classes.
COUNTS = {'small': (29_132_752, 29_115_184, 28_488_008, 28_457_168),
          'base': (121_163_552, 121_126_784, 119_203_608, 119_139_168),
          'medium': (231_414_560, 231_377_792, 229_454_616, 229_390_176),
          'large': (407_249_952, 407_200_896, 404_112_408, 404_026_464),
          'huge': (906_966_560, 906_892_928, 900_687_384, 900_558_432)}
OFFICIAL = {'small': 'S', 'base': 'B', 'medium': 'M', 'large': 'L', 'huge': 'H'}
CIFAR = dict(in_channels=3, num_classes=0)


@pytest.mark.parametrize('size', COUNTS)
def test_published_sizes(size):
    for patch, *counts in zip((2, 4), COUNTS[size][:2], COUNTS[size][2:], strict=True):
        for arch, count in zip((f'{size}_p{patch}', dict(base=f'{size}_p{patch}', **CIFAR)),
                               counts, strict=True):
            with torch.device('meta'):
                model = DiS(arch)
            assert sum(p.numel() for p in model.parameters()) == count
            found = infer_arch(model.state_dict())
            assert found == arch or found == model.arch
            side = model.arch['image_size']
            x = torch.zeros(1, model.in_channels, side, side, device='meta')
            labels = torch.zeros(1, dtype=torch.long, device='meta')
            out = model(x, torch.zeros(1, device='meta'), labels if model.num_classes else None)
            assert out.shape == (1, 2 * model.in_channels, side, side)


def test_names_and_shapes_of_the_public_code():
    listed = json.loads(shared('facts/keys/dis.json').read_text())
    for size, letter in OFFICIAL.items():
        for patch in (2, 4):
            for task, arch in (('imagenet256_latent', {}), ('cifar10_uncond', CIFAR)):
                entry = listed[f'DiS-{letter}/{patch}:{task}']
                with torch.device('meta'):
                    model = DiS(dict(base=f'{size}_p{patch}', **arch))
                found = {k: list(v.shape) for k, v in model.state_dict().items()}
                first = {k: v for k, v in found.items() if '_blocks.' not in k
                         or k.startswith(('in_blocks.0.', 'out_blocks.0.'))}
                assert entry['keys'].items() <= found.items()
                assert {k for k in first if not k.startswith('out_blocks')} <= set(entry['keys'])
                assert len(model.in_blocks) == entry['in_blocks']
                assert len(model.out_blocks) == entry['out_blocks']


def test_rows_of_the_zoo():
    rows = {e.name: e for e in zoo.entries('dis')}
    assert all(e.weights is None and e.task == 'diffusion' for e in rows.values())
    assert {e.arch for e in rows.values()} <= set(ARCHS)
    published = {e.name: e.metrics for e in rows.values() if e.metrics}
    assert [list(m.values()) for m in published.values()] == [[2.10], [2.88]]


# --- files --------------------------------------------------------------------------------------

def save_as_published(path, model, averaged):
    """As the public training writes it: with averages beside, and a Namespace."""
    torch.save(dict(model=model.state_dict(), ema=averaged.state_dict(), opt={},
                    args=argparse.Namespace(model='DiS-S/2', num_classes=5)), path)
    return path


@each_small
def test_files_of_the_public_code(tmp_path, arch, capsys):
    raw, averaged = make(arch, 1), make(arch, 2)
    path = save_as_published(tmp_path / 'dis.pt', raw, averaged)
    for weights, expected in (('auto', averaged), ('model', raw), ('model_ema', averaged)):
        model = DiS(arch)
        model.load_pretrained(str(path), weights=weights)
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
    assert "taking the averaged weights, 'ema'" in capsys.readouterr().out
    configured = MODELS.build(dict(type='vmamba_mm.DiS', arch=arch, init_cfg=dict(
        type='Pretrained', checkpoint=str(path))))
    configured.init_weights()
    assert torch.equal(configured.pos_embed, averaged.pos_embed)


@each_small
def test_names_are_told(arch):
    state = make(arch).state_dict()
    assert family_of(state) is FAMILY
    found = infer_arch(state)
    even = dict(DiS(arch).arch, depth=2 * len(DiS(arch).in_blocks))
    assert found == even
    ours = to_mm(state)
    assert set(ours) == {f'backbone.{k}' for k in state}
    assert set(to_official(ours)) == set(state)


def test_wrong_files_are_refused(tmp_path):
    state = make().state_dict()
    lacking = {k: v for k, v in state.items() if k != 'mid_block.norm.weight'}
    for content, message in (
            (lacking, 'mid_block.norm.weight'),
            (make(dict(SMALL, depth=2)).state_dict(), 'depth.*2|in_blocks.1'),
            (make(dict(SMALL, image_size=8)).state_dict(), 'image_size.*8|pos_embed')):
        torch.save(dict(ema=content), tmp_path / 'a.pt')
        model = make()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match=message) as raised:
            model.load_pretrained(str(tmp_path / 'a.pt'))
        assert '\n' not in str(raised.value)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- what is wrong ------------------------------------------------------------------------------

@pytest.mark.parametrize('change, message', [
    (dict(embed_dims=0), 'embed_dims.*at least 2'), (dict(depth=1), 'depth.*at least 2'),
    (dict(image_size=7), 'image_size.*=7 must be a multiple of .*=2'),
    (dict(num_classes=-1), 'num_classes.*at least 0'), (dict(norm='bn'), "'rms' or 'ln'"),
    (dict(d_conv=1), 'd_conv'), (dict(dt_rank=0), 'dt_rank'), (dict(learn_sigma=1), 'learn_sigma'),
    (dict(expand=0.01), 'expand'), (dict(stages=3), r"unknown keys \['stages'\]")])
def test_wrong_architectures_name_the_choices(change, message):
    with pytest.raises(ValueError, match=message):
        DiS(dict(SMALL, **change))


def test_wrong_values_name_the_choices():
    with pytest.raises(ValueError, match="arch='tiny' does not exist.*small_p2"):
        DiS('tiny')
    with pytest.raises(ValueError, match='drop_path_rate'):
        DiS(SMALL, drop_path_rate=1.0)


def test_wrong_inputs_say_what_is_expected():
    model, plain = make(), make(PLAIN)
    x, t, labels = inputs_of(model)
    for arguments, message in [
            ((torch.randn(2, 3, 8, 6), t, labels), r'takes \(B, 3, 6, 6\), got \(2, 3, 8, 6\)'),
            ((torch.randn(2, 1, 6, 6), t, labels), 'takes'), ((x[0], t, labels), 'takes'),
            ((x, t), 'with 5 classes needs labels; 5 is the one of no class'),
            ((x, t, torch.tensor([0, 6])), r'from 0 to 5.*\[0, 6\]'),
            ((x, t, torch.tensor([-1, 0])), 'from 0 to 5')]:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    x, t, _ = inputs_of(plain)
    with pytest.raises(ValueError, match='has no classes and takes no labels'):
        plain(x, t, torch.tensor([0, 1]))
    nan = plain(torch.full_like(x, torch.nan), t)
    assert nan.isnan().all()  # and no silent number
