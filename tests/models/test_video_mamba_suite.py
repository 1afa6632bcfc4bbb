"""What is special about the models of Video Mamba Suite; tests/families has what all share."""

import argparse

import pytest
import torch
from specs import SPECS
from torch.nn import functional as F

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.heads import ClipTower
from vmamba_mm.layers.positions import resize_time
from vmamba_mm.models import ActionMamba, MaskMambaBlock, TimeMamba, Vim, ViViM
from vmamba_mm.testing import assert_close

FRAME, VANILLA = SPECS['vivim'].first, SPECS['timemamba'].first


def randomized(model, seed=0):
    """Every parameter is random, those that start as ones and zeros as well; in eval mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


# --- class tokens and styles ----------------------------------------------------------------------

CLS_TOKENS = [(ViViM, dict(FRAME, cls_token=kind, num_frames=frames))
              for kind, frames in (('frame', 3), ('clip', 3), ('clip', 2))] \
    + [(TimeMamba, dict(VANILLA, style=style))
       for style in ('timesformer-div', 'frozen-in-time', 'frozen-joint')]


@pytest.mark.parametrize('kind, arch', CLS_TOKENS)
@pytest.mark.parametrize('size', [(4, 16, 16), (1, 20, 7), (3, 2, 30)])
def test_class_token_and_its_gradients(kind, arch, size):
    model = kind(arch, out_type='cls_token', drop_path_rate=0.1, with_cp=True).train()
    feature, = model(torch.randn(2, 3, *size))
    assert feature.shape == (2, arch['embed_dims'])
    feature.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    with torch.device('meta'):
        maps, = kind(arch)(torch.empty(2, 3, *size))
    height, width = (max(1, side // 4) for side in size[1:])
    assert maps.shape == (2, arch['embed_dims'], size[0], height, width)


def test_vivim_puts_a_class_token_in_the_middle_of_each_frame_or_of_the_clip():
    """The tokens of the first block, written out once more."""
    clip = torch.randn(2, 3, 3, 16, 16)
    for kind in ('frame', 'clip'):
        model = randomized(ViViM(dict(FRAME, cls_token=kind)))
        tokens = []
        model.blocks[0].register_forward_pre_hook(lambda m, args, t=tokens: t.append(args[0]))
        model(clip)
        pos, time = model.pos_embed[0], model.temporal_embedding[:, 0]
        cls = model.cls_token[0, 0] + pos[8]
        patches = [[model.patch_embed.proj(clip[:, :, t])[:, :, i // 4, i % 4]
                    + pos[i + (i >= 8)] + time[t] for i in range(16)] for t in range(3)]
        if kind == 'frame':
            expected = [y for t in range(3)
                        for y in (*patches[t][:8], (cls + time[t]).expand(2, -1), *patches[t][8:])]
        else:
            flat = [y for frame in patches for y in frame]
            expected = [*flat[:24], cls.expand(2, -1), *flat[24:]]
        assert_close(tokens[0], torch.stack(expected, dim=1), 1e-5)


def test_timemamba_starts_as_a_vit_on_each_frame():
    """The gate starts as 0; then the maps of a frame depend on others by the class token alone."""
    model = TimeMamba(VANILLA, out_indices=(0,)).eval()
    clip = torch.randn(1, 3, 3, 16, 16)
    changed = clip.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        (first,), (second,) = model(clip), model(changed)
        assert torch.equal(first[:, :, :2], second[:, :, :2])
        model.blocks[0].alpha_timeattn.fill_(0.5)
        gated, = model(changed)
        assert not torch.allclose(gated[:, :, :2], second[:, :, :2])


@pytest.mark.parametrize('style', ['timesformer-div', 'frozen-in-time', 'frozen-joint'])
def test_timemamba_block_patch_after_patch(style):
    """As the authors' code has the tokens: the frames of a patch follow one another."""
    block = randomized(TimeMamba(dict(VANILLA, style=style)).blocks[0])
    frames, patches = 3, 4
    cls, x = torch.randn(2, 1, 64), torch.randn(2, patches, frames, 64)
    found = block(torch.cat((cls, x.transpose(1, 2).flatten(1, 2)), 1), frames)
    joint = style == 'frozen-joint'
    y = block.norm3(x).flatten(1, 2) if joint else block.norm3(x).flatten(0, 1)
    mixed = x + block.alpha_timeattn.tanh() * block.time_mamba(y).view_as(x)
    answers = [block.attn(block.norm1(torch.cat((cls, mixed[:, :, t]), 1))) for t in range(frames)]
    cls = cls + sum(y[:, :1] for y in answers) / frames
    x = (mixed if style == 'timesformer-div' else x) \
        + torch.stack([y[:, 1:] for y in answers], dim=2)
    expected = [y + block.mlp(block.norm2(y)) for y in (cls, x.transpose(1, 2).flatten(1, 2))]
    assert_close(found, torch.cat(expected, 1), 1e-5)


@pytest.mark.parametrize('kind', [ViViM, TimeMamba])
def test_wrong_out_type(kind):
    with pytest.raises(ValueError, match="out_type='raw' does not exist; choose 'featmap' or"):
        kind(out_type='raw')


# --- official files -------------------------------------------------------------------------------

def save_official(path, tower):
    """A file of the official pre-training: both towers, and the arguments of the script."""
    state, = SPECS[tower.backbone.family.name].official(tower.backbone)
    state = {f'module.visual.{k}': v for k, v in state.items()}
    state['module.visual.image_projection'] = tower.head.proj.detach()
    state['module.textual.transformer.resblocks.0.ln_1.weight'] = torch.ones(4)
    state['module.logit_scale'] = torch.tensor(2.7)
    torch.save(dict(epoch=5, state_dict=state, scaler={}, best_acc1=0.3,
                    args=argparse.Namespace(model='CLIP', clip_length=4)), path)
    return str(path)


@pytest.mark.parametrize('kind, arch', [(ViViM, FRAME), (TimeMamba, VANILLA)])
def test_towers_of_official_files(kind, arch, tmp_path):
    def make(**kwargs):
        return ClipTower(kind(arch, out_type='cls_token', **kwargs), output_dims=5)

    source = randomized(make())
    path = save_official(tmp_path / 'clip.pt', source)
    tower, clip = make().eval(), torch.randn(1, 3, 3, 16, 16)
    tower.load_pretrained(path)
    torch.save(tower.state_dict(), tmp_path / 'ours.pt')
    again = make().eval()
    again.load_pretrained(tmp_path / 'ours.pt')
    alone = kind(arch, out_type='cls_token', init_cfg=dict(
        type='Pretrained', checkpoint=path, prefix='backbone.')).eval()
    alone.init_weights()
    with torch.no_grad():
        expected = source(clip)
        assert torch.equal(tower(clip), expected) and torch.equal(again(clip), expected)
        assert torch.equal(alone(clip)[0] @ source.head.proj, expected)
    with pytest.raises(UserError, match=r'clip.pt does not fit the model: head.proj is \(.*, 5\)'):
        ClipTower(kind(arch, out_type='cls_token'), output_dims=6).load_pretrained(path)
    torch.save(dict(a=torch.ones(1)), tmp_path / 'none.pt')
    with pytest.raises(UserError, match=f'none.pt holds no {kind.__name__}; one is needed'):
        make().load_pretrained(tmp_path / 'none.pt')


def test_official_classifier_of_timemamba(tmp_path):
    """Its backbone is called visual; the head lies beside it."""
    source = randomized(TimeMamba(VANILLA))
    official, = SPECS['timemamba'].official(source)
    head = {'fc_cls.weight': torch.randn(7, 64), 'fc_cls.bias': torch.randn(7)}
    state = {f'visual.{k}': v for k, v in official.items()} | head
    expected = {f'backbone.{k}': v for k, v in source.state_dict().items()} \
        | {k.replace('fc_cls', 'head.fc'): v for k, v in head.items()}
    for keep_places in (False, True):
        for wrapper in ('', 'module.'):
            file = tmp_path / 'cls.pt'
            torch.save(dict(state_dict={f'{wrapper}{k}': v for k, v in state.items()},
                            args=argparse.Namespace(num_classes=7)), file)
            read = read_checkpoint(file, keep_places=keep_places)
            assert read['meta'] == dict(arch=VANILLA, task='cls')
            assert set(read['state_dict']) == set(expected)
            assert all(torch.equal(read['state_dict'][k], v) for k, v in expected.items())
    # With a text encoder beside it, it is no classifier and stays where it is.
    torch.save(state | {'textual.x': torch.ones(1)}, file)
    assert list(read_checkpoint(file, keep_places=True)['state_dict']) == [*state, 'textual.x']


def test_vivim_starts_from_vim(tmp_path):
    arch = dict(FRAME, num_frames=3)
    vim = randomized(Vim({k: arch[k] for k in ('embed_dims', 'depth', 'd_state', 'patch_size',
                                               'image_size')} | dict(cls_token='middle')))
    ours = vim.state_dict()
    names = {'norm2.weight': 'norm_f.weight'}
    official = {names.get(k, k).replace('blocks.', 'layers.'): v for k, v in ours.items()}
    official |= {'head.weight': torch.ones(5, 8), 'head.bias': torch.ones(5)}
    torch.save(dict(model=official, args=argparse.Namespace(epochs=300)), tmp_path / 'vim.pth')
    torch.save({f'backbone.{k}': v for k, v in ours.items()}, tmp_path / 'ours.pth')
    for file in ('vim.pth', 'ours.pth'):
        model = ViViM(arch, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / file),
                                          from_vim=True))
        model.init_weights()
        for key, value in model.state_dict().items():
            if key == 'temporal_embedding':
                assert not value.any()
            else:
                assert torch.equal(value, ours['norm2.weight' if key == 'norm.weight' else key])
        with pytest.raises(UserError, match='holds a Vim of images.*take from_vim=True'):
            ViViM(arch).load_pretrained(str(tmp_path / file))
    # One frame with a temporal embedding of zeros is an image of Vim.
    image = torch.randn(2, 3, 16, 16)
    model = ViViM(dict(arch, num_frames=1), out_type='cls_token').eval()
    model.load_pretrained(str(tmp_path / 'vim.pth'), from_vim=True)
    vim.out_type = 'cls_token'
    with torch.no_grad():
        assert_close(model(image.unsqueeze(2))[0], vim(image)[0], 1e-5)
    with pytest.raises(UserError, match='blocks.0.mixer.norm.weight is missing'):
        ViViM(dict(arch, mixer='scan_norm')).load_pretrained(
            str(tmp_path / 'vim.pth'), from_vim=True)


class ClipVision(torch.nn.Module):
    """CLIP's image encoder by its own names (OpenAI's model.py, open_clip), with GELU."""

    def __init__(self, dim, depth, heads, patch, tokens):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, dim, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(dim))
        self.positional_embedding = torch.nn.Parameter(torch.randn(tokens, dim))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim, 1e-6)
        blocks = [torch.nn.Module() for _ in range(depth)]
        for block in blocks:
            block.ln_1, block.ln_2 = (torch.nn.LayerNorm(dim, 1e-6) for _ in range(2))
            block.attn = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
            block.mlp = torch.nn.Sequential()
            block.mlp.add_module('c_fc', torch.nn.Linear(dim, dim // 2))
            block.mlp.add_module('gelu', torch.nn.GELU())
            block.mlp.add_module('c_proj', torch.nn.Linear(dim // 2, dim))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(blocks)
        self.proj = torch.nn.Parameter(torch.randn(dim, 5))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False)[0]
            x = x + block.mlp(block.ln_2(x))
        return self.ln_post(x[:, 0])


def test_timemamba_starts_from_clip(tmp_path):
    torch.manual_seed(0)
    clip = ClipVision(64, 3, 1, 4, 17).eval()
    text = {'logit_scale': torch.ones(()), 'positional_embedding': torch.ones(7, 4),
            'transformer.resblocks.0.ln_1.weight': torch.ones(4)}
    state = {f'visual.{k}': v for k, v in clip.state_dict().items()}
    torch.save(state | text, tmp_path / 'openai.pt')
    torch.save(dict(state_dict={f'module.{k}': v for k, v in (state | text).items()}),
               tmp_path / 'trained.pt')
    torch.save(clip.state_dict(), tmp_path / 'visual.pt')
    image = torch.randn(2, 3, 16, 16)
    for file in ('openai.pt', 'trained.pt', 'visual.pt'):
        model = TimeMamba(VANILLA, out_type='cls_token', init_cfg=dict(
            type='Pretrained', checkpoint=str(tmp_path / file), from_clip=True)).eval()
        gate = model.blocks[0].alpha_timeattn
        model.init_weights()
        assert model.blocks[0].alpha_timeattn is gate and not gate.any()
        with torch.no_grad():
            assert_close(model(image.unsqueeze(2))[0], clip(image), 1e-5)
    TimeMamba(dict(VANILLA, image_size=24)).load_pretrained(str(tmp_path / 'openai.pt'),
                                                            from_clip=True)
    for arch, change, message in (
            (VANILLA, lambda s: s.pop('visual.conv1.weight'), 'patch_embed.proj.weight is missing'),
            (VANILLA, lambda s: s.update({'visual.layer1.0.conv1.weight': torch.ones(1)}),
             'but visual.layer1.0.conv1.weight is of no ViT'),
            (VANILLA, lambda s: s.pop('visual.class_embedding'), 'no image encoder of a CLIP'),
            (dict(VANILLA, mlp_ratio=1.0), lambda s: None, r'mlp.fc1.weight is \(32, 64\)')):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / 'changed.pt')
        with pytest.raises(UserError, match=message):
            TimeMamba(arch).load_pretrained(str(tmp_path / 'changed.pt'), from_clip=True)


def test_position_embeddings_of_other_sizes(tmp_path):
    source = randomized(ViViM(FRAME))
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    model = ViViM(dict(FRAME, image_size=24, num_frames=5))
    model.load_pretrained(str(tmp_path / 'a.pth'))
    pos = source.pos_embed[0]
    grid = torch.cat((pos[:8], pos[9:])).T.reshape(1, 8, 4, 4)
    expected = F.interpolate(grid, (6, 6), mode='bicubic').flatten(2)[0].T
    assert torch.equal(model.pos_embed[0, 18], pos[8])
    assert_close(torch.cat((model.pos_embed[0, :18], model.pos_embed[0, 19:])), expected, 1e-6)
    assert_close(model.temporal_embedding, resize_time(source.temporal_embedding, 5), 1e-6)
    # What the weights are resized to, a clip of that size is resized to as well.
    clip = torch.randn(1, 3, 5, 24, 24)
    assert_close(model.eval()(clip)[0], source(clip)[0], 1e-4)
    model = ViViM(dict(FRAME, image_size=(8, 12)))
    torch.save(model.state_dict(), tmp_path / 'b.pth')
    with pytest.raises(UserError, match='6 patches, which are no square, .*to 4x4'):
        ViViM(FRAME).load_pretrained(str(tmp_path / 'b.pth'))
    source = randomized(TimeMamba(VANILLA))
    torch.save(source.state_dict(), tmp_path / 'c.pth')
    model = TimeMamba(dict(VANILLA, image_size=24))
    model.load_pretrained(str(tmp_path / 'c.pth'))
    assert_close(model.eval()(clip)[0], source(clip)[0], 1e-4)


def test_a_file_of_the_system_is_of_one_of_its_families():
    for model, name in ((ViViM(FRAME), 'vivim'), (TimeMamba(VANILLA), 'timemamba')):
        assert family_of(model.state_dict()).name == name


# --- ActionMamba ----------------------------------------------------------------------------------

def test_action_mamba():
    model = ActionMamba(6, 8, depths=(2, 1, 3))
    assert [name for name, _ in model.named_children()] == ['embd', 'embd_norm', 'stem', 'branch']
    assert {'embd.1.conv.weight', 'embd_norm.0.bias', 'stem.0.mamba.out_proj.weight',
            'branch.2.drop_path.scale', 'branch.0.norm.bias'} <= set(model.state_dict())
    mask = torch.ones(2, 1, 16, dtype=torch.bool)
    mask[1, :, 9:] = False
    x = torch.randn(2, 6, 16)
    features, masks = model(x, mask)
    assert [y.shape for y in features] == [(2, 8, 16), (2, 8, 8), (2, 8, 4), (2, 8, 2)]
    for y, m in zip(features, masks, strict=True):
        assert m.dtype == torch.bool and m.shape == (2, 1, y.shape[2])
    assert [m[1].sum().item() for m in masks] == [9, 5, 3, 2]
    for y, m in zip(features[1:], masks[1:], strict=True):
        assert not (y * ~m).any()
    sum(y.square().sum() for y in features).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_action_mamba_block():
    """Its branch starts small; the mask is of its result alone."""
    torch.manual_seed(0)
    block = MaskMambaBlock(8, drop_path=0.0)
    assert not any('scale' in name for name, _ in block.named_parameters())
    x, mask = torch.randn(1, 8, 12), torch.arange(12).view(1, 1, 12) < 7
    y, same = block(x, mask)
    assert same is mask and torch.equal(y[..., 7:], x[..., 7:])
    x[..., 7] *= -1
    assert not torch.equal(block(x, mask)[0][..., :7], y[..., :7])  # the backward scan sees it
    block = MaskMambaBlock(8, drop_path=0.5).eval()
    y, _ = block(x, mask)
    assert 0 < (y - x).abs().max() < 1e-2
    vim = MaskMambaBlock(8, mixer='vim')
    assert vim.mamba.inner_dims == 16 and block.mamba.inner_dims == 8
    block.train()
    outs = {block(x, mask)[0].sum().item() for _ in range(20)}
    assert len(outs) == 2  # with the branch and without


def test_action_mamba_refuses():
    mask = torch.ones(1, 1, 12, dtype=torch.bool)
    model = ActionMamba(4, 8, depths=(1, 0, 3))
    with pytest.raises(ValueError, match='a sequence of 3 positions cannot be halved: pad it'):
        model(torch.randn(1, 4, 12), mask)
    for wrong in (mask.float(), mask[:, 0], mask[..., :8]):
        with pytest.raises(ValueError, match=r'mask must be of bool and \(1, 1, 12\), got'):
            model(torch.randn(1, 4, 12), wrong)
    for kwargs, message in ((dict(depths=(2, 2)), '3 ints'), (dict(kernel_size=2), 'must be odd'),
                            (dict(mixer='v1'), "choose 'dbm' or 'vim'")):
        with pytest.raises(ValueError, match=message):
            ActionMamba(4, 8, **kwargs)
    with pytest.raises(ValueError, match='stride must be 1 or 2'):
        MaskMambaBlock(8, stride=3)
