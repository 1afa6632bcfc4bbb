"""What is Vim's own: the class token, position embeddings, features, the code's other options."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from specs import SPECS

from vmamba_mm.errors import UserError
from vmamba_mm.models import Vim
from vmamba_mm.models.vim import rope

SPEC = SPECS['vim']
MIDDLE = SPEC.archs['middle']
#: Where each kind of class token stands among 8 or 9 patches.
PLACES = {8: {'middle': [4], 'head': [0], 'double': [0, 9], 'none': []},
          9: {'middle': [4], 'head': [0], 'double': [0, 10], 'none': []}}


def random_model(arch=MIDDLE, **kwargs):
    return SPEC.random_model(arch, **kwargs)


def tokens_by_hand(model, x):
    """Patches row by row, class tokens at their places, and the position embedding."""
    conv = model.patch_embed.proj
    patches = F.conv2d(x, conv.weight, conv.bias, conv.stride).flatten(2).transpose(1, 2)
    tokens = list(patches.unbind(1))
    kind = model.arch['cls_token']
    names = {'double': ['cls_token_head', 'cls_token_tail'], 'none': []}.get(kind, ['cls_token'])
    for name, place in zip(names, PLACES[len(tokens)][kind], strict=True):
        tokens.insert(place, getattr(model, name)[0].expand(len(x), -1))
    return torch.stack(tokens, 1) + model.pos_embed


def streams_by_hand(model, tokens):
    """(the sum of all blocks up to there, what the block has added) after each block."""
    streams, stream = [], tokens
    for block in model.blocks:
        added = block.mixer(block.norm(stream))
        stream = stream + added
        streams.append((stream, added))
    return streams


def patches_of(tokens, kind, height, width):
    places = PLACES[height * width][kind]
    kept = [i for i in range(tokens.shape[1]) if i not in places]
    return tokens[:, kept].transpose(1, 2).unflatten(2, (height, width))


# --- tokens and features ------------------------------------------------------------------------

@pytest.mark.parametrize('kind', PLACES[9])
@pytest.mark.parametrize('size', [(12, 12), (8, 16)], ids=str)
def test_class_tokens_and_features(kind, size):
    """Of an odd and an even number of patches."""
    height, width = size[0] // 4, size[1] // 4
    model = random_model(dict(MIDDLE, cls_token=kind, image_size=size), out_indices=(0, 2))
    x = torch.randn(2, 3, *size)
    streams = streams_by_hand(model, tokens_by_hand(model, x))
    normed = model.norm2(streams[2][0])
    expected = dict(normed=(streams[0][0], normed), stream=(streams[0][0], streams[2][0]),
                    mixer=(streams[0][1], streams[2][1]))
    for features, wanted in expected.items():
        other = Vim(model.arch, (0, 2), features=features).eval()
        other.load_state_dict({k: v for k, v in model.state_dict().items()
                               if k in other.state_dict()})
        for y, tokens in zip(other(x), wanted, strict=True):
            torch.testing.assert_close(y, patches_of(tokens, kind, height, width))
    model.out_type = 'raw'
    torch.testing.assert_close(model(x), (streams[0][0], normed))
    if kind != 'none':
        model.out_type = 'cls_token'
        places = PLACES[height * width][kind]
        for y, tokens in zip(model(x), (streams[0][0], normed), strict=True):
            torch.testing.assert_close(y, tokens[:, places].mean(1))


def test_norm_is_there_where_it_is_used():
    """What is not used would stop DistributedDataParallel."""
    for kwargs in (dict(out_indices=(1,)), dict(features='stream'), dict(features='mixer')):
        model = Vim(MIDDLE, **kwargs)
        assert not any(name.startswith('norm') for name, _ in model.named_parameters())
        model(torch.randn(1, 3, 16, 16))[0].sum().backward()
        used = {name for name, p in model.named_parameters() if p.grad is not None}
        last = model.out_indices[-1]
        assert used == {name for name, _ in model.named_parameters()
                        if not name.startswith('blocks.') or int(name.split('.')[1]) <= last}


def test_features_of_mixers_are_not_dropped():
    torch.manual_seed(0)
    model = Vim(dict(MIDDLE, depth=2), features='mixer', drop_path_rate=0.9).train()
    maps = model(torch.randn(16, 3, 16, 16))[0]
    assert (maps.flatten(1) != 0).any(1).all()


def test_image_of_another_size():
    """The patches' embedding is resized; that of the class token stays, at its new place."""
    model, x = random_model(), torch.randn(1, 3, 20, 24)
    other = random_model(dict(MIDDLE, image_size=(20, 24)))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k != 'pos_embed'},
                          strict=False)
    rows = model.pos_embed[0]
    grid = F.interpolate(torch.cat([rows[:8], rows[9:]]).T.unflatten(1, (4, 4))[None], (5, 6),
                         mode='bicubic')[0].flatten(1).T
    other.pos_embed.data[0] = torch.cat([grid[:15], rows[8:9], grid[15:]])
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize('kwargs, message', [
    (dict(out_type='map'), "out_type='map' does not exist.*'featmap', 'cls_token', 'raw'"),
    (dict(features='all'), "features='all' does not exist.*'normed', 'stream', 'mixer'"),
    (dict(arch=dict(MIDDLE, cls_token='none'), out_type='cls_token'), "cls_token.*is 'none'")])
def test_wrong_options_name_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Vim(**{'arch': MIDDLE, **kwargs})
    with pytest.raises(ValueError, match="resize='nearest' does not exist.*'published'"):
        Vim(MIDDLE).load_pretrained('none.pth', resize='nearest')


def test_initial_values():
    """Those of the official code: dt of the backward direction starts with a bias of 0."""
    torch.manual_seed(0)
    model = Vim(dict(base='tiny', depth=4))
    for block in model.blocks:
        mixer = block.mixer
        dt = F.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
        assert not mixer.dt_proj_b.bias.any() and (mixer.D_b == 1).all()
        bound = 384 ** -0.5 / 2  # kaiming, by the root of the depth
        assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound
    for weight, std in ((model.pos_embed, 0.02), (model.cls_token, 0.02),
                        (model.patch_embed.proj.weight, 768 ** -0.5 / 0.88)):
        rel = 0.2 if weight.numel() < 1000 else 0.05
        assert weight.std().item() == pytest.approx(std, rel=rel)
    assert not model.patch_embed.proj.bias.any()


# --- the code's other options -------------------------------------------------------------------

def test_pairs():
    model = random_model(dict(MIDDLE, depth=4, paired=True, cls_token='none', mixer='causal'),
                         out_type='raw')
    x = torch.randn(2, 3, 12, 12)
    hidden, residual = model.embed(x)[0], None
    for first, second in zip(model.blocks[::2], model.blocks[1::2], strict=True):
        inputs = [t for t in (hidden, residual) if t is not None]
        one, other = first(*inputs), second(*(t.flip(1) for t in inputs))
        hidden, residual = (a + b.flip(1) for a, b in zip(one, other, strict=True))
    torch.testing.assert_close(model(x)[0], model.norm3(hidden + residual))


def test_reversed_sequence():
    arch = dict(MIDDLE, mixer='causal')
    model = random_model(dict(arch, reverse=True), out_type='raw')
    plain = random_model(arch, out_type='raw')
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    tokens = plain.embed(x)[0].flip(1)
    (stream, _), = streams_by_hand(plain, tokens)[-1:]
    torch.testing.assert_close(model(x)[0], plain.norm2(stream))
    model.out_type = 'cls_token'
    torch.testing.assert_close(model(x)[0], plain.norm2(stream)[:, 8])
    model.out_type = 'featmap'
    torch.testing.assert_close(model(x)[0], patches_16(plain.norm2(stream).flip(1)))


def patches_16(tokens):
    return torch.cat([tokens[:, :8], tokens[:, 9:]], 1).transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize('extra', [0, 1])
def test_rotary_embedding(extra):
    """Pairs of channels are complex numbers; the first token of one more stays as it is."""
    height, width, dims = 3, 5, 8
    tokens = torch.randn(2, height * width + extra, dims, dtype=torch.float64)
    found = rope(tokens, (height, width), 14)
    numbers = torch.view_as_complex(tokens[:, extra:].unflatten(2, (-1, 2)).contiguous())
    for i in range(height):
        for j in range(width):
            angles = [14 * place * rate for place in (i / height, j / width)
                      for rate in (1, 10000 ** -0.5)]
            turned = numbers[:, i * width + j] * torch.tensor(
                [complex(math.cos(a), math.sin(a)) for a in angles])
            torch.testing.assert_close(found[:, extra + i * width + j],
                                       torch.view_as_real(turned).flatten(1),
                                       rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, :extra], tokens[:, :extra])
    backwards = rope(tokens.flip(1), (height, width), 14, reverse=True)
    torch.testing.assert_close(backwards.flip(1), found)


@pytest.mark.parametrize('kind', ['hidden', 'both'])
def test_rotation_comes_before_every_block(kind):
    model = random_model(dict(MIDDLE, cls_token='none', rope=kind), out_indices=(0, 1, 2),
                         features='stream', out_type='raw')
    x = torch.randn(2, 3, 16, 16)
    hidden, residual, expected = rope(model.embed(x)[0], (4, 4), 14), None, []
    for i, block in enumerate(model.blocks):
        hidden, residual = block(hidden, residual)
        if i < 2:
            hidden = rope(hidden, (4, 4), 14)
            residual = rope(residual, (4, 4), 14) if kind == 'both' else residual
        expected.append(hidden + residual)
    torch.testing.assert_close(model(x), tuple(expected))


# --- loading ------------------------------------------------------------------------------------

def official_file(path, model, **more):
    """A file of the official training, with an object of argparse."""
    state = SPEC.official_classifiers(model, 10)[0]
    torch.save(dict(model=state, optimizer={}, lr_scheduler={}, epoch=299, scaler='none',
                    args=argparse.Namespace(model='vim', drop_path=0.0), **more), path)
    return str(path)


def test_a_training_file_is_read_as_data(tmp_path):
    raw, averaged = random_model(seed=1), random_model(seed=2)
    path = official_file(tmp_path / 'a.pth', raw, model_ema=SPEC.official_classifiers(
        averaged, 10)[0])
    for weights, expected in (('model', raw), ('model_ema', averaged), ('auto', averaged)):
        model = Vim(MIDDLE)
        model.load_pretrained(path, weights=weights)
        for key, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('resize, place', [('by token', 8), ('published', 0)])
@pytest.mark.parametrize('kind', ['middle', 'none'])
def test_position_embedding_of_another_size(tmp_path, resize, place, kind):
    """From 4x4 patches and a class token to 6x6 with or without one, by hand."""
    source = random_model()
    path = official_file(tmp_path / 'a.pth', source)
    model = Vim(dict(MIDDLE, image_size=24, cls_token=kind), init_cfg=dict(
        type='Pretrained', checkpoint=path, resize=resize))
    model.init_weights()
    rows = source.pos_embed[0]
    cls, patches = rows[place:place + 1], torch.cat([rows[:place], rows[place + 1:]])
    grid = F.interpolate(patches.T.unflatten(1, (4, 4))[None], (6, 6), mode='bicubic',
                         align_corners=False)[0].flatten(1).T
    new_place = 18 if resize == 'by token' else 0
    expected = grid if kind == 'none' else torch.cat([grid[:new_place], cls, grid[new_place:]])
    torch.testing.assert_close(model.pos_embed[0], expected)
    assert (model.cls_token is None) == (kind == 'none')
    for key, value in source.state_dict().items():
        if key in model.state_dict() and key != 'pos_embed':
            assert torch.equal(model.state_dict()[key], value), key


def test_class_token_is_left_out_without_resizing(tmp_path):
    source = random_model()
    path = official_file(tmp_path / 'a.pth', source)
    model = Vim(dict(MIDDLE, cls_token='none'), features='stream')
    model.load_pretrained(path)
    rows = source.pos_embed[0]
    assert torch.equal(model.pos_embed[0], torch.cat([rows[:8], rows[9:]]))
    model.load_pretrained(path, resize='published')
    assert torch.equal(model.pos_embed[0], rows[1:])


def test_what_cannot_be_resized(tmp_path):
    path = official_file(tmp_path / 'a.pth', random_model(dict(MIDDLE, image_size=(8, 12))))
    with pytest.raises(UserError, match='of 6 patches, which are no square, cannot be .* 4x4'):
        Vim(MIDDLE).load_pretrained(path)
    path = official_file(tmp_path / 'b.pth', random_model(dict(MIDDLE, cls_token='none')))
    with pytest.raises(UserError, match='cls_token is missing'):
        Vim(MIDDLE).load_pretrained(path)


def test_backbone_of_an_official_segmentor(tmp_path):
    """Its pyramid lies in the backbone there, and the norm at the end is not used."""
    source = random_model(dict(MIDDLE, cls_token='none'))
    state = {f'backbone.{k}': v for k, v in SPEC.official(source)[0].items()}
    state |= {'backbone.fpn1.0.weight': torch.ones(8, 8, 2, 2), 'decode_head.x': torch.ones(1)}
    torch.save(dict(meta={}, state_dict=state), tmp_path / 'a.pth')
    model = Vim(source.arch, features='stream')
    model.load_pretrained(str(tmp_path / 'a.pth'))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
