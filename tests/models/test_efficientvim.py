"""What is special about EfficientViM; tests/families/efficientvim.py has the rest."""

import pytest
import timm
import torch
from torch import nn

from vmamba_mm.checkpoints.names import to_mm, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.heads import StageFusionHead
from vmamba_mm.models import EfficientViM
from vmamba_mm.models.efficientvim import HiddenStateMixer
from vmamba_mm.testing import Classifier, assert_close

ARCH = dict(embed_dims=(8, 12, 16), depths=(1, 2, 1), d_state=(6, 4, 3))


def classifier(distilled=False, arch=None):
    arch = arch or ARCH
    dims = arch['embed_dims']
    return Classifier(EfficientViM(arch, (2,), with_states=True), 5, head=StageFusionHead(
        5, (*dims, dims[-1]), distilled))


def randomise(model):
    """Every parameter and statistic is random, and the variances are positive."""
    rng = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand(value.shape, generator=rng))
    return model.double().eval()


# --- the mixer ------------------------------------------------------------------------------------

@torch.no_grad()
def test_mixer_is_that_of_the_paper():
    """State by state."""
    torch.manual_seed(0)
    mixer, x = HiddenStateMixer(6, 4, 1.5).double(), torch.randn(2, 3, 5, 6).double()
    y, states = mixer(x)
    projected = mixer.dw(mixer.BCdt_proj(x).movedim(-1, 1)).flatten(2)  # (B, 3 N, L)
    tokens, read = x.flatten(1, 2), torch.zeros(2, 15, 6).double()
    for n in range(4):
        B, C, dt = projected[:, n], projected[:, 4 + n], projected[:, 8 + n]
        weights = (dt + mixer.A[n]).softmax(1) * B
        state = (weights[:, :, None] * tokens).sum(1, keepdim=True)
        h, z = mixer.hz_proj(state).split(9, dim=-1)
        state = mixer.out_proj(h * (nn.functional.silu(z) + mixer.D))
        assert_close(states[:, n:n + 1], state, 1e-12)
        read += C[:, :, None] * state
    assert_close(y.flatten(1, 2), read, 1e-12)


def test_decays_have_no_effect_and_a_gradient_of_zero():
    torch.manual_seed(0)
    mixer, x = HiddenStateMixer(6, 4), torch.randn(2, 3, 5, 6)
    expected = mixer(x)[0]
    expected.sum().backward()
    assert mixer.A.grad is not None and not mixer.A.grad.any()
    nn.init.uniform_(mixer.A, -100, 100)
    assert torch.equal(mixer(x)[0], expected)


# --- against timm ---------------------------------------------------------------------------------

@pytest.mark.parametrize('distilled', [False, True])
def test_timm_says_the_same(distilled):
    """Whose model is another's work on the official code: states of either load into the other."""
    theirs = randomise(timm.create_model(
        'efficientvim_m1' + ('_dist' if distilled else ''), num_classes=5,
        embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], state_dim=ARCH['d_state']))
    ours = classifier(distilled).double().eval()
    ours.load_state_dict(to_mm(theirs.state_dict()))
    x = torch.randn(2, 3, 96, 64).double()
    assert_close(ours(x), theirs(x), 1e-10)
    norms = {k for k, v in theirs.state_dict().items() if '.norm.' in k or k.startswith('norm.')}
    for key, value in to_official(ours.state_dict()).items():
        assert key in norms or value.shape == theirs.state_dict()[key].shape, key


# --- outputs and files ----------------------------------------------------------------------------

@torch.no_grad()
def test_states_beside_the_last_map():
    torch.manual_seed(0)
    model, x = EfficientViM(ARCH, (2,), with_states=True).eval(), torch.randn(2, 3, 70, 50)
    outs = model(x)
    assert [y.shape[1:] for y in outs] == [(8, 6), (12, 4), (16, 3), (16, 2, 1)]
    assert model.out_channels == [8, 12, 16, 16] and model.num_features == [8, 12, 16]
    plain = EfficientViM(ARCH)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k[:4] != 'norm'})
    results = []
    for stage in plain.eval().stages:
        stage.blocks[-1].register_forward_hook(lambda block, args, out: results.append(out))
    found = plain(x)
    maps, states = zip(*results, strict=True)
    for out, expected in zip(found, maps, strict=True):
        assert torch.equal(out, expected.movedim(-1, 1))
    for i in range(3):
        norm = model.get_submodule(f'norm{i}')
        torch.testing.assert_close(outs[i], norm(states[i]).mT)
    torch.testing.assert_close(outs[3], model.norm3(maps[2].movedim(-1, 1)))


@pytest.mark.parametrize('options, message', [
    (dict(with_states=1), 'with_states must be True or False, got 1'),
    (dict(with_states=True), r'needs out_indices=\(2,\), got \(0, 1, 2\)')])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientViM(ARCH, **options)


def test_arguments_told_by_weights():
    for kwargs in (dict(with_states=True, out_indices=[2]), {}):
        model = EfficientViM(ARCH, in_channels=4, **kwargs)
        assert EfficientViM.arguments_of(model.state_dict()) == dict(in_channels=4, **kwargs)


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('weights', ['auto', 'model'])
def test_official_training_files(distilled, weights, tmp_path):
    """Two sets of weights, the averaged ones taken by default; a backbone leaves heads out."""
    raw, averaged = (randomise(classifier(distilled)).float() for _ in range(2))
    nn.init.ones_(raw.backbone.stages[0].blocks[0].alpha)
    official = {key: to_official(model.state_dict()) for key, model in (
        ('model', raw), ('model_ema', averaged))}
    assert official['model']['norm.3.weight'].shape == (1, 16, 1, 1)
    assert ('heads_dist.3.bias' in official['model']) == distilled
    file = tmp_path / 'a.pth'
    torch.save(dict(official, optimizer={}, epoch=299, max_accuracy=74.6), file)
    expected = (raw if weights == 'model' else averaged).backbone.state_dict()
    for kwargs in (dict(with_states=True, out_indices=(2,)), {}):
        model = EfficientViM(ARCH, **kwargs)
        model.load_pretrained(str(file), weights=weights)
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match='does not fit the model'):
        EfficientViM(dict(ARCH, expand=2.0)).load_pretrained(str(file))


def test_a_distilled_file_is_not_a_plain_one():
    """Their backbones are the same, their heads are not."""
    plain, distilled = classifier(), classifier(distilled=True)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*head.weights_dist'):
        plain.load_state_dict(to_mm(to_official(distilled.state_dict())))
    plain.backbone.load_state_dict(distilled.backbone.state_dict())
