"""What is special about VSSD; tests/families/vssd.py has the rest."""

import pytest
import torch
from torch import nn

from vmamba_mm import zoo
from vmamba_mm.checkpoints import files
from vmamba_mm.errors import UserError
from vmamba_mm.models import VSSD, vssd
from vmamba_mm.models.vssd import ConvUnit, NonCausalSSD
from vmamba_mm.ops import nc_ssd_mixer
from vmamba_mm.testing import Classifier, assert_close

TINY = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), d_state=3)
SIMPLE = dict(TINY, num_heads=(2, 4, 4, 8), n_groups=2, positive=False, stem='patch',
              downsample='conv')


# --- the mixer ------------------------------------------------------------------------------------

def by_hand(mixer, x):
    """Figure 3 of the paper, head by head, of an image (B, H, W, C)."""
    inner, state, _ = mixer.sizes
    z, xBC, dt = mixer.in_proj(x).split((inner, inner + 2 * state, mixer.num_heads), dim=-1)
    xBC = nn.functional.silu(mixer.conv2d(xBC.movedim(-1, 1))).flatten(2).mT
    values, keys, queries = xBC.split(mixer.sizes, dim=-1)
    dt = nn.functional.softplus(dt.flatten(1, 2) + mixer.dt_bias)
    heads, size, groups = [], inner // mixer.num_heads, mixer.n_groups
    for h in range(mixer.num_heads):
        own = slice(h * size, (h + 1) * size)
        group = slice(h % groups * state // groups, (h % groups + 1) * state // groups)
        weight = dt[..., h, None] * mixer.A_log[h].exp() * (1 if mixer.positive else -1)
        scores = queries[..., group] @ keys[..., group].mT  # every token sees every other
        heads.append(scores @ (weight * values[..., own]) + mixer.D[h] * values[..., own])
    y = nn.functional.layer_norm(torch.cat(heads, -1), (inner,), mixer.norm.weight,
                                 mixer.norm.bias)
    return mixer.out_proj(y.view(z.shape) * z)


@pytest.mark.parametrize('groups, positive', [(1, True), (2, False), (4, True)])
def test_mixer_is_that_of_the_paper(groups, positive):
    torch.manual_seed(0)
    mixer = NonCausalSSD(8, 4, 3, n_groups=groups, positive=positive).double()
    nn.init.normal_(mixer.norm.weight)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    assert_close(mixer(x), by_hand(mixer, x), 1e-12)
    mixer.conv2d.register_forward_hook(lambda *args: None)  # then the convolution is called
    assert_close(mixer(x), by_hand(mixer, x), 1e-12)


def test_rows_of_multiples_of_16_bytes(monkeypatch):
    """As on a GPU, of 19 numbers and 5 zeros: the same results and gradients."""
    torch.manual_seed(0)
    mixer = NonCausalSSD(4, 1, 1).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    results, strides = [], []
    monkeypatch.setattr(vssd, 'nc_ssd_mixer', lambda x, *args, **kwargs: (
        strides.append(x.stride(2)), nc_ssd_mixer(x, *args, **kwargs))[1])
    for on_gpu in (False, True):
        monkeypatch.setattr(vssd, 'runs_kernels', lambda x, on_gpu=on_gpu: on_gpu)
        y = mixer(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])])
    assert strides == [19, 24]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-12)


def test_initial_values():
    torch.manual_seed(0)
    mixer = VSSD(dict(TINY, embed_dims=64, num_heads=(64, 64, 64, 64))).stages[0].blocks[0].attn
    dt = nn.functional.softplus(mixer.dt_bias).detach()
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16 and (mixer.D == 1).all()
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize('heads, groups', [(3, 1), (4, 3)])
def test_heads_and_groups_that_do_not_fit(heads, groups):
    with pytest.raises(ValueError, match=f'num_heads={heads} must divide.*n_groups={groups}'):
        NonCausalSSD(8, heads, 4, n_groups=groups)


# --- weights --------------------------------------------------------------------------------------

class Config(dict):
    """As yacs' CfgNode, of which a pickle keeps the class and a dict."""


def official(model):
    """A training file's state dict."""
    names = {'norm3': 'norm', 'stages': 'layers', 'patch_embed': 'patch_embed'}
    state = {}
    for key, value in model.backbone.state_dict().items():
        top, _, rest = key.partition('.')
        rest = rest.replace('.qkv.', '.to_qkv.').replace('.proj.', '.to_out.')
        state[f'{names[top]}.{rest}'] = value.clone()
    return state | {f'head.{k}': v.clone() for k, v in model.head['fc'].state_dict().items()}


@pytest.mark.parametrize('arch', [TINY, SIMPLE], ids=['published', 'simple'])
@pytest.mark.parametrize('weights', ['auto', 'model', 'model_ema'])
def test_official_training_files(arch, weights, tmp_path, capsys):
    """With averaged weights beside the others, and a config that is no plain dict."""
    raw, averaged = (Classifier(VSSD(arch, out_indices=(3,)), 5) for _ in range(2))
    torch.save(dict(model=official(raw), model_ema=official(averaged), optimizer={}, epoch=299,
                    config=Config(MODEL=Config(TYPE='vssd')), max_accuracy=82.5,
                    max_accuray_ema=82.4), tmp_path / 'a.pth')
    model = VSSD(arch, out_indices=(3,))
    model.load_pretrained(str(tmp_path / 'a.pth'), weights=weights)
    expected = (raw if weights == 'model' else averaged).backbone.state_dict()
    assert all(map(torch.equal, model.state_dict().values(), expected.values()))
    with pytest.raises(UserError, match='does not fit the model'):
        VSSD(dict(arch, d_state=8), out_indices=(3,)).load_pretrained(str(tmp_path / 'a.pth'))


def test_the_set_that_was_published(tmp_path, monkeypatch):
    """Of micro it is not the averaged one."""
    sets = {name: official(Classifier(VSSD(TINY, out_indices=(3,)), 5))
            for name in ('model', 'model_ema')}
    torch.save(sets, tmp_path / 'a.pth')
    monkeypatch.setattr(files, 'fetch', lambda source: tmp_path / 'a.pth')
    address = zoo.find('vssd/micro').weights
    for source, weights, expected in [
            ('vmamba_mm://vssd/micro', 'auto', 'model'), (address, 'auto', 'model'),
            ('vmamba_mm://vssd/tiny', 'auto', 'model_ema'), ('a.pth', 'auto', 'model_ema'),
            ('vmamba_mm://vssd/micro', 'model_ema', 'model_ema')]:
        found = files.read_checkpoint(source, weights)
        assert found['meta']['weights'] == expected
        assert torch.equal(found['state_dict']['head.fc.weight'], sets[expected]['head.weight'])


# --- one image ------------------------------------------------------------------------------------

def directional(function, tensors):
    """Two numbers that agree: along a random direction, of the gradients and by differences."""
    directions = [torch.randn_like(t) for t in tensors]
    grads = torch.autograd.grad(function(), tensors)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            for t, direction in zip(tensors, directions, strict=True):
                t.add_(direction, alpha=sign * step)
            values.append(function())
            for t, direction in zip(tensors, directions, strict=True):
                t.sub_(direction, alpha=sign * step)
    by_gradients = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    return by_gradients.item(), ((values[0] - values[1]) / (2 * step)).item()


def loss_of(maps):
    """With the tokens in front of the channels, as heads that take tokens have them."""
    rng = torch.Generator().manual_seed(1)
    total = 0
    for y in maps:
        tokens = y.flatten(2).transpose(1, 2)
        total = total + (tokens * torch.randn(tokens.shape, generator=rng, dtype=y.dtype)).sum()
    return total


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('arch', [TINY, SIMPLE], ids=['published', 'simple'])
def test_gradients_of_one_image(arch, training):
    """Of a batch norm before a permutation they would be wrong on a CPU, without a word."""
    torch.manual_seed(1)  # with another, a ReLU may have its kink on the way
    model = VSSD(arch).double().train(training)
    x = torch.randn(1, 3, 44, 72, dtype=torch.float64, requires_grad=True)
    for tensors in ([x], list(model.patch_embed.parameters()), list(model.stages.parameters())):
        by_gradients, by_differences = directional(lambda: loss_of(model(x)), tensors)
        assert by_gradients == pytest.approx(by_differences, rel=1e-6)


def test_batch_norm_on_a_cpu():
    """It is torch's own, but its gradients are sums that keep the digits of fp32."""
    torch.manual_seed(0)
    unit = ConvUnit(3, 4, act=False).eval()
    for name, t in [*unit.norm.named_parameters(), *unit.norm.named_buffers()]:
        if name != 'num_batches_tracked':
            t.data.uniform_(0.5, 1.5)
    x, grad = torch.randn(2, 160, 160, 3), torch.randn(2, 160, 160, 4)

    def run(unit, norm, x, grad):
        unit.zero_grad()
        y = unit.conv(x.permute(0, 3, 1, 2))
        y = norm(y).permute(0, 2, 3, 1) if norm else unit(x)
        y.backward(grad)
        return y.detach(), unit.norm.weight.grad.clone(), unit.norm.bias.grad.clone()

    found, plain = run(unit, None, x, grad), run(unit, unit.norm, x, grad)
    exact = run(unit.double(), unit.norm, x.double(), grad.double())
    for one, other, right in zip(found, plain, exact, strict=True):
        assert_close(one, right, 1e-6)
        assert_close(other, right, 1e-4)


class ChannelsFirst(nn.Conv2d):
    """A convolution in a user's place, whose result has the channels first in memory."""

    def forward(self, x):
        return super().forward(x).contiguous()


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('conv', [nn.Conv2d, ChannelsFirst])
def test_gradients_through_a_batch_norm_of_one_image(conv, training):
    """Whatever the convolution has done, and whatever strides the gradient has."""
    torch.manual_seed(0)
    unit = ConvUnit(3, 4, act=False)  # an activation would hide it
    unit.conv = conv(3, 4, 1)
    unit.double().train(training)
    for size in ((5, 6), (1, 7), (2, 1)):
        x = torch.randn(1, *size, 3, dtype=torch.float64, requires_grad=True)
        by_gradients, by_differences = directional(
            lambda: loss_of([unit(x).movedim(-1, 1)]), [x, *unit.parameters()])  # noqa: B023
        assert by_gradients == pytest.approx(by_differences, rel=1e-6)
