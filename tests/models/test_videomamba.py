"""What is VideoMamba's own: orders, position embeddings, images into clips, ways of training."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from specs import SPECS

from vmamba_mm.errors import UserError
from vmamba_mm.families.videomamba import ORDERS
from vmamba_mm.heads import DistilledVideoMamba, MaskedVideoMamba, VideoEncoder
from vmamba_mm.models import VideoMamba

SPEC = SPECS['videomamba']
CLIP, IMAGE = SPEC.archs['clip'], SPEC.archs['image']
#: Four blocks each: s reads frame by frame, t place by place.
BLOCKS = {'spatial-first': 'ssss', 'temporal-first': 'tttt', 'half-spatial-half-temporal': 'sstt',
          'half-temporal-half-spatial': 'ttss', 'alternate': 'stst'}


def clip(batch=2, frames=2, height=8, width=8, channels=3):
    return torch.randn(batch, channels, frames, height, width)


def random_model(arch, **kwargs):
    return SPEC.random_model(arch, **kwargs)


# --- tokens and their orders --------------------------------------------------------------------

@pytest.mark.parametrize('order', ORDERS)
def test_orders(order):
    """By a permutation written out; the class token stays first."""
    arch = dict(CLIP, depth=4, num_frames=3, image_size=(8, 12), order=order)
    model, x = random_model(arch, out_type='raw', out_indices=(0, 1, 2, 3)), clip(2, 3, 8, 12)
    tokens, _ = model.embed(x)
    places = 6
    to_temporal = [0] + [1 + t * places + place for place in range(places) for t in range(3)]
    back = torch.tensor(to_temporal).argsort()
    stream, expected = tokens, []
    for block, kind in zip(model.blocks, BLOCKS[order], strict=True):
        y = block.norm(stream)
        y = block.mixer(y[:, to_temporal])[:, back] if kind == 't' else block.mixer(y)
        stream = stream + y
        expected.append(stream)
    expected[-1] = model.norm(stream)
    for out, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(out, want)
    model.out_type = 'cls_token'
    for out, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(out, want[:, 0])
    model.out_type = 'featmap'
    for out, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(out.flatten(2).transpose(1, 2), want[:, 1:])


def test_tokens():
    """Frame by frame, row by row; the class token has a place in space and none in time."""
    model = random_model(CLIP)
    x = clip()
    tokens, _ = model.embed(x)
    spatial, temporal = model.spatial_pos_embed[0], model.temporal_pos_embed[0]
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0] + spatial[0])
    weight, bias = model.patch_embed.proj.weight[:, :, 0], model.patch_embed.proj.bias
    patch = x[1, :, 1, 4:8, 0:4]  # the second frame, second row, first column
    expected = (weight * patch).sum((1, 2, 3)) + bias + spatial[1 + 2] + temporal[1]
    torch.testing.assert_close(tokens[1, 1 + 4 + 2], expected)


def test_an_image_in_a_model_of_clips_has_no_place_in_time():
    """With the weights of a model of images it gives what that gives."""
    images, clips = random_model(IMAGE), random_model(CLIP)
    clips.load_state_dict(
        images.state_dict() | {'temporal_pos_embed': clips.temporal_pos_embed,
                               'patch_embed.proj.weight': images.patch_embed.proj.weight.unsqueeze(
                                   2)})
    x = torch.randn(2, 3, 8, 12)
    for out, want in zip(clips(x), images(x), strict=True):
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize('arch, shape, message', [
    (IMAGE, (1, 3, 2, 8, 8), r'takes images, \(B, C, H, W\), got .*\(1, 3, 2, 8, 8\)'),
    (CLIP, (3, 8, 8), r'takes clips, \(B, C, T, H, W\), got'),
    (dict(CLIP, tubelet_size=2), (1, 3, 8, 8), 'takes clips'),
    (dict(CLIP, tubelet_size=2), (1, 3, 1, 8, 8), 'at least 2 frames, the tubelet_size, got 1')])
def test_wrong_inputs(arch, shape, message):
    with pytest.raises(ValueError, match=message):
        VideoMamba(arch)(torch.randn(shape))


@pytest.mark.parametrize('out_type', ['featmap', 'cls_token', 'raw'])
def test_dtype_of_the_outputs(out_type):
    """That of the weights, though the residual stream is fp32."""
    model = random_model(CLIP, out_type=out_type, out_indices=(0, 2))
    with torch.autocast('cpu', torch.bfloat16):
        assert {y.dtype for y in model(clip())} == {torch.float32}
    assert {y.dtype for y in model.bfloat16()(clip().bfloat16())} == {torch.bfloat16}


def test_wrong_out_type():
    with pytest.raises(ValueError, match="out_type='avg' does not exist; choose one of .*'raw'"):
        VideoMamba(CLIP, out_type='avg')


def test_initial_values():
    """The rule for every Linear comes last, and takes dt's own away, as published."""
    torch.manual_seed(0)
    model = VideoMamba(dict(CLIP, embed_dims=64, depth=4)).requires_grad_(False)
    assert not model.cls_token.any() and not model.temporal_pos_embed.any()
    assert model.spatial_pos_embed.std() == pytest.approx(0.02, rel=0.2)
    for block in model.blocks:
        mixer = block.mixer
        for suffix in ('', '_b'):
            dt_proj = getattr(mixer, f'dt_proj{suffix}')
            assert not dt_proj.bias.any() and dt_proj.weight.std() == pytest.approx(0.02, rel=0.3)
            assert getattr(mixer, f'x_proj{suffix}').weight.std() == pytest.approx(0.02, rel=0.3)
        # Uniform in 1 / sqrt(inputs), less by the square root of the depth.
        assert mixer.out_proj.weight.abs().max() == pytest.approx(128 ** -0.5 / 2, rel=0.01)


# --- files --------------------------------------------------------------------------------------

def saved(path, model):
    """As the official trainer writes it, with its options in a Namespace."""
    state = SPEC.official(model)[0]
    options = argparse.Namespace(model='videomamba')
    torch.save(dict(model=state, args=options, epoch=3), path)
    return str(path)


def test_position_embeddings_are_resized_from_what_the_file_holds(tmp_path):
    source = random_model(CLIP)
    path = saved(tmp_path / 'a.pth', source)
    model = VideoMamba(dict(CLIP, image_size=(12, 16), num_frames=6))
    model.load_pretrained(path)
    spatial, temporal = source.spatial_pos_embed, source.temporal_pos_embed
    maps = F.interpolate(spatial[:, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2), (3, 4),
                         mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.spatial_pos_embed, torch.cat(
        [spatial[:, :1], maps.flatten(2).transpose(1, 2)], 1))
    torch.testing.assert_close(model.temporal_pos_embed, F.interpolate(
        temporal.transpose(1, 2), 6, mode='linear', align_corners=False).transpose(1, 2))
    # A clip of another size than the arch's is treated the same.
    x = clip(1, 6, 12, 16)
    for out, want in zip(source(x), model.eval()(x), strict=True):
        torch.testing.assert_close(out, want)


def test_what_is_no_square_cannot_be_resized(tmp_path):
    path = saved(tmp_path / 'a.pth', random_model(dict(CLIP, image_size=(8, 12))))
    with pytest.raises(UserError, match='of 6 patches, which are no square, .* resized to 4x4'):
        VideoMamba(dict(CLIP, image_size=16)).load_pretrained(path)


def test_clips_do_not_go_into_images(tmp_path):
    path = saved(tmp_path / 'a.pth', random_model(CLIP))
    with pytest.raises(UserError, match='a.pth does not fit the model: it holds the arch'):
        VideoMamba(IMAGE).load_pretrained(path)


@pytest.mark.parametrize('inflate, expected', [('center', (0, 1, 0)), ('mean', (1 / 3,) * 3)])
def test_images_into_clips(tmp_path, inflate, expected):
    """By the option alone, and the temporal embedding stays."""
    source = random_model(IMAGE)
    path = saved(tmp_path / 'a.pth', source)
    arch = dict(CLIP, num_frames=6, tubelet_size=3)
    with pytest.raises(UserError, match="a VideoMamba of images.*take inflate='center'.*'mean'"):
        VideoMamba(arch).load_pretrained(path)
    with pytest.raises(ValueError, match="inflate='middle' does not exist.*'center', 'mean'"):
        VideoMamba(arch).load_pretrained(path, inflate='middle')
    model = random_model(arch, init_cfg=dict(type='Pretrained', checkpoint=path, inflate=inflate))
    before = model.temporal_pos_embed.clone()
    model.init_weights()
    assert torch.equal(model.temporal_pos_embed, before)
    for i, factor in enumerate(expected):
        torch.testing.assert_close(model.patch_embed.proj.weight[:, :, i],
                                   factor * source.patch_embed.proj.weight)
    own = saved(tmp_path / 'b.pth', model)  # a file of clips is loaded as it is
    again = VideoMamba(arch)
    again.load_pretrained(own, inflate=inflate)
    assert torch.equal(again.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_a_masked_pre_training_starts_a_backbone(tmp_path):
    """Its norm has another official name, and what it decodes to is left out."""
    pre_training = MaskedVideoMamba(random_model(CLIP), 5)
    state = {k.removeprefix('backbone.').replace('blocks.', 'layers.'): v
             for k, v in pre_training.state_dict().items()}
    state['pos_embed'] = state.pop('spatial_pos_embed')
    state['temporal_pos_embedding'] = state.pop('temporal_pos_embed')
    torch.save(dict(model=state), tmp_path / 'a.pth')
    model = VideoMamba(CLIP)
    model.load_pretrained(str(tmp_path / 'a.pth'))
    for key, value in model.state_dict().items():
        assert torch.equal(value, pre_training.backbone.state_dict()[key]), key


# --- ways of training ---------------------------------------------------------------------------

def test_self_distillation():
    student = DistilledVideoMamba(VideoMamba(dict(IMAGE, embed_dims=12), out_type='raw'), 5, 8)
    teacher = DistilledVideoMamba(VideoMamba(IMAGE, out_type='raw'), 5)
    x = torch.randn(2, 3, 8, 8)
    (logits, features), (_, targets) = student(x), teacher(x)
    assert logits.shape == (2, 5) and features.shape == targets.shape == (2, 5, 8)
    for vectors in (features, targets):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 5))
    assert teacher.distill_head is None
    (logits.sum() + (2 - 2 * (features * targets).sum(-1)).mean()).backward()
    assert all(p.grad is not None for p in student.parameters())


def masked(batch=2, tokens=9, visible=4):
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(tokens - 1)[:visible - 1] + 1] = False
    mask[:, 0] = False
    return mask


def test_masked_pre_training():
    torch.manual_seed(0)
    model = MaskedVideoMamba(VideoMamba(CLIP), 5, num_features=2, interval=2)
    features = model(clip(), masked())
    assert features.shape == (2, 2, 4, 5)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 2, 4))
    # The published setting takes what is before the last block's result.
    model = MaskedVideoMamba(VideoMamba(CLIP), 5)
    model(clip(), masked()).square().sum().backward()
    for name, p in model.named_parameters():
        is_left_out = name.startswith(('backbone.blocks.2.', 'backbone.norm.'))
        assert (p.grad is None or not p.grad.any()) == is_left_out, name
    model = MaskedVideoMamba(VideoMamba(CLIP), 5, add_last=True)
    model(clip(), masked()).square().sum().backward()
    assert model.backbone.blocks[2].mixer.out_proj.weight.grad.any()
    with pytest.raises(ValueError, match='num_features=3 with interval=2 asks for more blocks'):
        MaskedVideoMamba(VideoMamba(CLIP), 5, num_features=3, interval=2)
    with pytest.raises(ValueError, match="order='spatial-first'.*got 'alternate'"):
        MaskedVideoMamba(VideoMamba(dict(CLIP, order='alternate')), 5)


@pytest.mark.parametrize('pool, clips, frames', [
    ('cls', 1, 1), ('avg', 1, 2), ('cls+avg', 1, 2), ('cls_cat_avg', 2, 3)])
def test_video_encoder(pool, clips, frames):
    model = VideoEncoder(random_model(CLIP), 5, pool=pool)
    tokens, pooled = model(clip())
    assert tokens.shape == (2, 8, 8) and pooled.shape == (2, clips, 8)
    assert model(clip(), keep_temporal=True)[1].shape == (2, frames, 8)
    _, _, features = model(clip(), masked())
    assert features.shape == (1, 2, 4, 5)
    assert model(torch.randn(2, 3, 8, 8), keep_temporal=True)[0].shape == (2, 4, 8)  # images


def test_wrong_pool():
    with pytest.raises(ValueError, match="pool='max' does not exist; choose one of .*'cls.avg'"):
        VideoEncoder(VideoMamba(CLIP), pool='max')


def test_the_encoder_in_a_file_of_clips_and_texts(tmp_path):
    """By its prefix, or as the only one there; what it was decoded and pooled with is left out."""
    source = random_model(CLIP)
    state = SPEC.official(source)[0]
    state['norm.weight'] = state.pop('norm_f.weight')
    state |= {'clip_decoder.0.head.weight': torch.ones(5, 8), 'pool_norm.bias': torch.ones(8)}
    content = {f'vision_encoder.{k}': v for k, v in state.items()} | {
        'text_encoder.bert.pooler.weight': torch.ones(2, 2), 'clip_teacher.proj': torch.ones(2)}
    torch.save(dict(model=content), tmp_path / 'a.pth')
    for prefix in ('vision_encoder', None):
        model = VideoMamba(CLIP)
        model.load_pretrained(str(tmp_path / 'a.pth'), prefix=prefix)
        for key, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key


@pytest.mark.parametrize('build, parameters', [
    (lambda: DistilledVideoMamba(VideoMamba('middle'), 1000, 384), 74_439_592),
    (lambda: DistilledVideoMamba(VideoMamba('base'), 1000, 384), 97_894_504),
    (lambda: MaskedVideoMamba(VideoMamba('middle_f8'), 512), 73_941_504),
    (lambda: VideoEncoder(VideoMamba('middle_f8'), 512), 73_942_656)])
def test_as_many_parameters_as_the_official_code(build, parameters):
    with torch.device('meta'):
        assert sum(p.numel() for p in build().parameters()) == parameters
