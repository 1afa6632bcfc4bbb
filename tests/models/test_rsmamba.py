"""RSMamba: its paths and permutations, its tokens, and the list of images that its configs read."""

import pytest
import torch
from specs import SPECS
from torch import nn

from vmamba_mm.errors import UserError
from vmamba_mm.layers import MambaMixer, MultiPathMixer
from vmamba_mm.models import RSMamba
from vmamba_mm.testing import assert_close

SPEC = SPECS['rsmamba']
SHUFFLED, MIDDLE = SPEC.archs['shuffled'], SPEC.archs['middle']


def images(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


# --- paths --------------------------------------------------------------------------------------

@pytest.mark.parametrize('is_watched', [False, True], ids=['one op', 'step by step'])
@pytest.mark.parametrize('paths, gated', [(1, True), (2, False), (2, True), (3, False), (3, True)])
def test_paths_are_a_mixer_run_on_each_order(paths, gated, is_watched):
    torch.manual_seed(0)
    mixer = MultiPathMixer(6, paths=paths, gated=gated, d_state=3).double()
    plain = MambaMixer(6, d_state=3).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != 'gate.weight'})
    if is_watched:
        mixer.conv1d.register_forward_hook(lambda *args: None)
    x, order = torch.randn(2, 7, 6).double(), torch.randperm(7)
    ys = [plain(x), plain(x.flip(1)).flip(1), plain(x[:, order])[:, order.argsort()]][:paths]
    weights = torch.full((2, paths), 1 / paths, dtype=torch.float64)
    if gated and paths > 1:
        weights = mixer.gate(torch.cat([y.mean(1) for y in ys], dim=1)).softmax(1)
    expected = sum(w[:, None, None] * y for w, y in zip(weights.T, ys, strict=True))
    assert_close(mixer(x, order if paths == 3 else None), expected, 1e-10)


def test_paths_and_permutations_belong_together():
    with pytest.raises(ValueError, match='paths=4 does not exist; choose 1, 2 or 3'):
        MultiPathMixer(6, paths=4)
    x = torch.randn(1, 5, 6)
    with pytest.raises(ValueError, match='of 3 paths needs a permutation'):
        MultiPathMixer(6)(x)
    with pytest.raises(ValueError, match='of 2 paths takes no permutation'):
        MultiPathMixer(6, paths=2)(x, torch.arange(5))


# --- permutations -------------------------------------------------------------------------------

def orders_of(model, x):
    """The permutations that each block is given in a call."""
    orders, hooks = [], []
    for block in model.blocks:
        hooks.append(block.register_forward_pre_hook(
            lambda module, args: orders.append(args[2])))
    model(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(orders)


def test_permutations_are_fixed_in_evaluation_and_drawn_in_training():
    model, x = SPEC.random_model(), images()
    fixed = orders_of(model, x)
    assert fixed.shape == (3, 16) and torch.equal(fixed.sort(1)[0], torch.arange(16).expand(3, -1))
    assert len(set(map(tuple, fixed.tolist()))) == 3
    # The same in every process, of all versions.
    assert fixed[0].tolist() == FIRST
    torch.manual_seed(5)
    other = SPEC.random_model(seed=7)
    assert torch.equal(orders_of(other, x), fixed)
    assert not torch.equal(orders_of(other.train(), x), orders_of(other, x))
    for shuffle, draws in (('always', (True, True)), ('never', (False, False))):
        model = RSMamba(SHUFFLED, shuffle=shuffle)
        for mode, is_new in zip((False, True), draws, strict=True):
            orders = orders_of(model.train(mode), x)
            assert torch.equal(orders, fixed) != is_new
            assert torch.equal(orders.sort(1)[0], torch.arange(16).expand(3, -1))


FIRST = [6, 3, 1, 7, 0, 15, 5, 11, 2, 10, 12, 13, 8, 4, 14, 9]


def test_permutations_of_ones_own():
    model, x = SPEC.random_model(), images()
    orders = [torch.randperm(16) for _ in range(3)]
    assert torch.equal(model(x, orders_of(model, x))[0], model(x)[0])
    assert not torch.equal(model(x, orders)[0], model(x)[0])
    assert torch.equal(model(x, torch.stack(orders))[0], model(x, orders)[0])
    with pytest.raises(ValueError, match='permutations must be 3, one for each block, got 2'):
        model(x, orders[:2])
    with pytest.raises(ValueError, match="path_type='forward_reverse_gate' takes no permutations"):
        SPEC.random_model(MIDDLE)(images(8, 12), orders)


def test_all_places_of_a_path_are_seen():
    """Through the shuffled path each token reaches tokens on both sides of it."""
    model, x = SPEC.random_model(dict(SHUFFLED, depth=1)), images().requires_grad_()
    y = model(x)[0][0, :, 2, 2].sum()
    reached = torch.autograd.grad(y, x)[0][0].abs().sum(0)
    assert (reached > 0).all()


# --- tokens -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, place', [('head', 0), ('middle', 3), ('tail', 6)])
def test_class_tokens(kind, place):
    """The map is of the patches, and the vector of the class token."""
    arch = dict(MIDDLE, cls_token=kind)
    model, x = SPEC.random_model(arch, out_type='raw', out_indices=(0, 2)), images(8, 12)
    tokens = model(x)
    assert [y.shape for y in tokens] == [(2, 7, 8)] * 2
    model.out_type = 'cls_token'
    for y, raw in zip(model(x), tokens, strict=True):
        assert torch.equal(y, raw[:, place])
    model.out_type = 'featmap'
    for y, raw in zip(model(x), tokens, strict=True):
        patches = torch.cat((raw[:, :place], raw[:, place + 1:]), dim=1)
        assert torch.equal(y.flatten(2).transpose(1, 2), patches)


def test_pooled_features():
    arch = dict(SHUFFLED, depth=2)
    model, x = SPEC.random_model(arch, out_type='avg_featmap', out_indices=(0, 1)), images()
    pooled = model(x)
    maps = [model.norm_output(i, y) for i, y in enumerate(model.forward_stages(x, (0, 1)))]
    for y, of_map in zip(pooled, maps, strict=True):
        torch.testing.assert_close(y, model.pool_norm(of_map.mean((2, 3))))
    assert RSMamba(arch).pool_norm is None


@pytest.mark.parametrize('kind', ['none', 'head', 'tail'])
def test_position_embeddings_of_other_sizes(kind, tmp_path):
    arch = dict(SHUFFLED, cls_token=kind)
    source = SPEC.random_model(arch)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    larger = RSMamba(dict(arch, image_size=32))
    larger.load_pretrained(str(tmp_path / 'a.pth'))
    assert larger.pos_embed.shape[1] == 64 + (kind != 'none')
    # Between the two sizes it is the same resizing, in the file and in a call.
    x = images(32, 32)
    torch.testing.assert_close(larger.eval()(x)[0], source(x)[0])


def test_sine_embedding():
    arch = dict(SHUFFLED, pos_embed='sine')
    model = SPEC.random_model(arch)
    assert 'pos_embed' not in model.state_dict()
    plain = SPEC.random_model(dict(arch, pos_embed='none'))
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(images())[0], plain(images())[0])
    assert model(images(20, 31))[0].shape == (2, 8, 5, 8)


@pytest.mark.parametrize('kwargs, message', [
    (dict(shuffle='random'), "shuffle='random' does not exist.*'training', 'always', 'never'"),
    (dict(out_type='map'), "out_type='map' does not exist.*'avg_featmap'"),
    (dict(out_type='cls_token'), "cls_token.*is 'none'")])
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RSMamba(SHUFFLED, **kwargs)


def test_initial_values_are_torchs_but_for_A_and_D():
    """dt has no initial values of Mamba's, as in the public code."""
    mixer = RSMamba(dict(SHUFFLED, embed_dims=64)).blocks[0].mixer
    bound = mixer.dt_proj.in_features ** -0.5
    assert mixer.dt_proj.bias.abs().max() <= bound and (mixer.dt_proj.bias > 0).any()
    torch.testing.assert_close(mixer.A_log[0].exp(), torch.tensor([1.0, 2.0]))
    assert isinstance(mixer.gate, nn.Linear) and (mixer.D == 1).all()


# --- lists of images ----------------------------------------------------------------------------

def test_list_of_images(tmp_path):
    pytest.importorskip('mmpretrain')
    from vmamba_mm.mm.image_list import ImageListDataset

    def data(text):
        (tmp_path / 'train.txt').write_text(text)
        return ImageListDataset(data_root=str(tmp_path), data_prefix='images', ann_file='train.txt',
                                classes=['river', 'beach'])

    found = data('beach/a.tif\n\nriver/b.tif')
    assert [(found.get_data_info(i)['img_path'], found.get_data_info(i)['gt_label'])
            for i in range(len(found))] == [(f'{tmp_path}/images/beach/a.tif', 1),
                                            (f'{tmp_path}/images/river/b.tif', 0)]
    with pytest.raises(UserError, match=r"line 2 of .*train.txt is 'lake/c.tif': expected "
                                        'CLASS/FILE with one of the 2 classes .* river, beach'):
        data('beach/a.tif\nlake/c.tif')
