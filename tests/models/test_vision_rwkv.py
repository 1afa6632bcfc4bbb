"""What is special about Vision-RWKV; the rest is in the generic tests."""

import math

import pytest
import torch
from specs import SPECS

from vmamba_mm.checkpoints.compare import differences
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import to_mm
from vmamba_mm.errors import UserError
from vmamba_mm.families.vision_rwkv import FAMILY
from vmamba_mm.models import VisionRWKV
from vmamba_mm.models.vision_rwkv import ChannelMix, SpatialMix
from vmamba_mm.ops.shift_mix.reference import quad_shift
from vmamba_mm.paths import CONFIGS
from vmamba_mm.testing import Classifier, assert_close

PRE_NORM, POST_NORM = (SPECS['vision_rwkv'].archs[name] for name in ('pre_norm', 'post_norm'))


def shift_by_hand(x, pixels=1):
    """Position by position, as section 3.2 says."""
    batch, height, width, channels = x.shape
    y = torch.zeros_like(x)
    for c in range(channels):
        group = next(i for i in range(4) if c < int(channels / 4 * (i + 1)))
        rows, columns = ((0, -1), (0, 1), (-1, 0), (1, 0))[group]
        for i in range(height):
            for j in range(width):
                a, b = i + pixels * rows, j + pixels * columns
                if 0 <= a < height and 0 <= b < width:
                    y[:, i, j, c] = x[:, a, b, c]
    return y


@pytest.mark.parametrize('size', [(3, 4, 8), (1, 1, 4), (1, 5, 7), (4, 2, 13)])
def test_shift(size):
    """With 13 channels the groups have 3, 3, 3 and 4."""
    x = torch.randn(2, *size)
    for pixels in (1, 2, 5):
        assert torch.equal(quad_shift(x, pixels), shift_by_hand(x, pixels))
    with_rest = quad_shift(x, share=0.1)
    cut = int(size[-1] * 0.1 * 4)
    assert torch.equal(with_rest[..., cut:], x[..., cut:])


def test_mixers_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8)
    att, ffn = SpatialMix(8), ChannelMix(8, 20)
    for module in (att, ffn):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    shifted = quad_shift(x)

    def mixed(module, name):
        share = getattr(module, f'spatial_mix_{name}')[0]
        return (share * x + (1 - share) * shifted).flatten(1, 2)

    k, v, r = (getattr(att, layer)(mixed(att, name)) for layer, name in (
        ('key', 'k'), ('value', 'v'), ('receptance', 'r')))
    index = torch.arange(12)
    distance = (index[:, None] - index).abs()[..., None]
    exponents = k[:, None] - (distance - 1) * att.spatial_decay / 12
    exponents = torch.where(distance == 0, (k + att.spatial_first / 12)[:, None], exponents)
    wkv = (exponents.softmax(2) * v[:, None]).sum(2)
    expected = att.output(torch.sigmoid(r) * wkv)
    assert_close(att(x), expected.view(x.shape), 1e-5)
    hidden = ffn.key(mixed(ffn, 'k')).relu() ** 2
    expected = torch.sigmoid(ffn.receptance(mixed(ffn, 'r'))) * ffn.value(hidden)
    assert_close(ffn(x), expected.view(x.shape), 1e-5)


def test_formula():
    """An arch of one's own has the paper's; published ones have the kernel's."""
    images, results = torch.randn(1, 3, 24, 24), {}
    for formula in ('paper', 'official'):
        torch.manual_seed(0)
        results[formula] = VisionRWKV(dict(PRE_NORM, formula=formula))(images)[0]
    torch.manual_seed(0)
    own = {key: value for key, value in PRE_NORM.items() if key != 'formula'}
    assert torch.equal(VisionRWKV(own)(images)[0], results['paper'])
    assert not torch.equal(results['paper'], results['official'])
    assert all(arch['formula'] == 'official' for arch in VisionRWKV.arch_settings.values()
               if 'mixer' not in arch)


def test_initial_values():
    model = VisionRWKV(dict(PRE_NORM, layer_scale=0.25))
    first, _, last = model.blocks
    assert first.att.spatial_decay[0] == -5 and first.att.spatial_decay[-1] == 3
    assert_close(last.att.spatial_decay[4], torch.tensor(-5 + 8 * (4 / 7) ** 2.0), 1e-6)
    bonus = torch.tensor([math.log(0.3) + d for d in (0, 0.5, -0.5)])
    assert_close(last.att.spatial_first[:3], bonus, 1e-6)
    share = (torch.arange(8) / 8) ** (1 / 3)
    assert_close(last.att.spatial_mix_k.flatten(), share, 1e-6)
    assert_close(last.att.spatial_mix_v.flatten(), share + 0.3, 1e-6)
    assert_close(last.att.spatial_mix_r.flatten(), share.sqrt(), 1e-6)
    assert_close(first.ffn.spatial_mix_r.flatten(), torch.arange(8) / 8, 1e-6)
    assert first.gamma1.unique().tolist() == [0.25] and first.ln0 and last.ln0 is None


def test_initial_values_of_v6():
    first, _, last = VisionRWKV(SPECS['vision_rwkv'].archs['v6']).blocks
    assert first.att.time_decay[..., 0] == -6 and last.att.time_decay[..., -1] == -1
    share = 1 - (torch.arange(12) / 12) ** (1 / 3)
    assert_close(last.att.time_maa_x.flatten(), share, 1e-6)
    assert_close(last.att.time_maa_v.flatten(), share - 0.3, 1e-6)
    assert_close(first.att.time_faaaa.flatten()[:3], torch.tensor([0, 0.1, -0.1]), 1e-6)
    assert 0 < first.att.time_maa_w1.abs().max() <= 1e-4


def test_shift_of_heads():
    x = torch.randn(1, 3, 4, 12)
    y = quad_shift(x.unflatten(-1, (2, 6)), 1).flatten(-2)
    for part in (slice(0, 6), slice(6, 12)):
        assert torch.equal(y[..., part], shift_by_hand(x[..., part]))


def test_share_of_the_shifts():
    images, results = torch.randn(1, 3, 16, 16), []
    for share in (0.25, 0.03, 0):
        torch.manual_seed(0)
        model = VisionRWKV(dict(PRE_NORM, shift_share=share))
        assert model.blocks[1].ffn.shift_share == model.blocks[1].att.shift_share == share
        results.append(model(images)[0])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])  # of 8 channels that is none


def test_tokens_are_the_map():
    images, (tokens, maps) = torch.randn(2, 3, 10, 22), ((), ())
    for out_type in ('raw', 'featmap'):
        torch.manual_seed(0)
        found = VisionRWKV(dict(POST_NORM), out_indices=(0, 2), out_type=out_type)(images)
        tokens, maps = maps, found
    for raw, one in zip(tokens, maps, strict=True):
        assert one.shape == (2, 14, 3, 6) and torch.equal(raw, one.flatten(2).mT)


def test_position_embedding_of_another_size(tmp_path):
    source = VisionRWKV(PRE_NORM)
    torch.nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    larger = VisionRWKV(dict(PRE_NORM, image_size=24))
    larger.load_pretrained(str(tmp_path / 'a.pth'))
    images = torch.randn(1, 3, 24, 24)  # for which the first one resizes its own
    assert_close(larger(images)[0], source(images)[0], 1e-5)
    torch.save(VisionRWKV(dict(PRE_NORM, image_size=(8, 12))).state_dict(), tmp_path / 'b.pth')
    with pytest.raises(UserError, match='6 patches, which are no square'):
        larger.load_pretrained(str(tmp_path / 'b.pth'))


def test_file_of_the_large_classifier(tmp_path):
    """Its head has a hidden layer, whose names are those of mmpretrain's."""
    model = Classifier(VisionRWKV(PRE_NORM), 5, hidden_dims=6)
    official = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (('.blocks.', '.layers.'), ('patch_embed.proj.', 'patch_embed.projec'
                             'tion.'), ('head.layers.pre_logits.', 'head.0.'),
                             ('head.layers.head.', 'head.2.'), ('.norm2.', '.ln1.')):
            key = key.replace(ours, theirs)
        official[key] = value
    torch.save(dict(model=official, model_ema={}), tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth', weights='model')['state_dict']
    assert model.load_state_dict(found)


def test_head_of_the_large_classifier_in_timm(tmp_path, monkeypatch):
    """On a smaller one, as if it had such a head."""
    timm = pytest.importorskip('timm')

    import vmamba_mm.timm  # noqa: F401 (registers the models)

    monkeypatch.setitem(FAMILY.head_dims, 'tiny', 6)
    model = timm.create_model('vision_rwkv_tiny', num_classes=5).eval()
    images = torch.randn(2, 3, 32, 48)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    hidden = torch.tanh(model.head.layers.pre_logits(pooled))
    assert pooled.shape == (2, 192) and hidden.shape == (2, 6)
    assert_close(model(images), model.get_classifier()(hidden), 1e-5)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=5)
    for classes in (5, 3, 0):
        loaded = timm.create_model('vision_rwkv_tiny', pretrained=True, num_classes=classes,
                                   pretrained_cfg_overlay=overlay).eval()
        assert_close(loaded.forward_features(images), model.forward_features(images), 1e-6)
        assert loaded(images).shape == (2, classes or 192)
    assert_close(loaded(images), pooled, 1e-5)
    model.reset_classifier(0)
    assert_close(model(images), pooled, 1e-5)


def test_large_classifier_has_the_published_weights():
    """In timm and in mmpretrain, by the names of the official file."""
    timm = pytest.importorskip('timm')
    mmengine = pytest.importorskip('mmengine')

    import vmamba_mm.timm  # noqa: F401 (registers the models)

    published = SPECS['vision_rwkv'].published_keys()
    if published is None:
        pytest.skip('no list of the official keys beside the checkout')
    official = {k: torch.empty(shape, device='meta') for k, shape in published['large'].items()}
    cfg = mmengine.Config.fromfile(
        CONFIGS / 'vision_rwkv/vision-rwkv-large-22kto1k_8xb128_in1k-384.py')
    mmengine.registry.init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        models = [timm.create_model('vision_rwkv_large.in22k_ft_in1k_384'),
                  mmengine.registry.MODELS.build(cfg.model)]
    assert models[0].default_cfg['input_size'] == (3, 384, 384)
    for model in models:
        assert differences(model.state_dict(), to_mm(official)) == {}
