"""SegMamba: the network, its files, the order across slices, and volumes of any size."""

import pytest
import torch
from specs import SPECS

from vmamba_mm.checkpoints.names import to_official
from vmamba_mm.errors import UserError
from vmamba_mm.heads import SegMamba
from vmamba_mm.layers import TriMambaMixer
from vmamba_mm.models.seg_mamba import TriMambaBlock
from vmamba_mm.ops import across_slices, along_slices

SMALL = SPECS['seg_mamba'].first


def small(**kwargs):
    torch.manual_seed(0)
    return SegMamba(**{**dict(in_channels=2, out_channels=3, arch=SMALL, hidden_dims=12), **kwargs})


def official(net):
    return to_official(net.state_dict())


@pytest.mark.parametrize('length, count', [(12, 3), (12, 1), (12, 12), (7, 3), (2, 8), (5, 4)])
def test_order_across_slices(length, count):
    """Written out as a walk; and back again."""
    size = -(-length // count)
    walk = [s * size + m for m in range(size) for s in range(count)
            if s * size + m < min(length, (s + 1) * size)]
    x = torch.arange(length).view(1, length, 1).expand(2, -1, 3)
    across = across_slices(x, count)
    assert across[1, :, 2].tolist() == walk
    assert torch.equal(along_slices(across, count), x)


def test_watched_modules_give_the_same():
    """Where somebody looks at a submodule every one is called, of all three orders."""
    torch.manual_seed(0)
    mixer, x = TriMambaMixer(6, d_state=3).double(), torch.randn(2, 10, 6, dtype=torch.double)
    expected, called = mixer(x, 4), []
    for name, module in mixer.named_children():
        module.register_forward_hook(lambda *args, name=name: called.append(name))
    torch.testing.assert_close(mixer(x, 4), expected)
    assert {'conv1d', 'conv1d_b', 'conv1d_s', 'x_proj_s', 'out_proj'} <= set(called)


def test_initial_values():
    """Mamba's own are those of the forward order alone, as in the public code."""
    torch.manual_seed(0)
    mixer = TriMambaMixer(64)
    steps = {s: torch.nn.functional.softplus(getattr(mixer, f'dt_proj{s}').bias)
             for s in ('', '_b', '_s')}
    assert 1e-4 < steps[''].min() and steps[''].max() < 0.11
    for suffix in ('_b', '_s'):
        assert 0.4 < steps[suffix].min() and steps[suffix].max() < 1.1
        assert torch.equal(mixer.A_log, getattr(mixer, f'A{suffix}_log'))


def test_slices_of_the_map():
    """'depth' is the order through real slices, which the fixed numbers are for one size alone."""
    torch.manual_seed(0)
    mixer, x = TriMambaMixer(4, d_state=2), torch.randn(1, 4, 3, 2, 5)
    by_depth, fixed, other = (TriMambaBlock(mixer, 4, n)(x) for n in (None, 3, 2))
    assert torch.equal(by_depth, fixed) and not torch.allclose(by_depth, other)
    assert small(arch=dict(SMALL, num_slices='depth')).backbone.stages[2].blocks[0].num_slices \
        is None


@pytest.mark.parametrize('size', [(17, 16, 16), (32, 30, 33), (1, 1, 17)])
def test_any_size(size):
    """Logits of the volume's size; what is padded below is cut off."""
    net, x = small().eval(), torch.randn(1, 2, *size)
    y = net(x)
    assert y.shape == (1, 3, *size) and y.isfinite().all()
    padded = torch.nn.functional.pad(x, [n for side in size[::-1] for n in (0, -side % 16)])
    torch.testing.assert_close(y, net(padded)[..., :size[0], :size[1], :size[2]])


@pytest.mark.parametrize('shape, message', [
    ((1, 2, 16, 16, 9), 'a volume of 16x16x9 voxels is too small.*more than 16'),
    ((1, 2, 32, 32), 'volumes .B, C, D, H, W., got')])
def test_volumes_that_no_model_takes(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(shape))


@pytest.mark.parametrize('kwargs, message', [
    (dict(out_channels=0), 'out_channels must be an int of at least 1'),
    (dict(hidden_dims=1.5), 'hidden_dims must be an int'), (dict(in_channels=0), 'in_channels'),
    (dict(arch='large'), "arch='large' does not exist; choose one of")])
def test_wrong_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


@pytest.mark.parametrize('wrap', [
    lambda s: s, lambda s: {'module': s}, lambda s: {f'module.{k}': v for k, v in s.items()}])
def test_official_files(wrap, tmp_path):
    """A bare state dict, and the two other forms that the public code's prediction takes."""
    source, path = small(), tmp_path / 'final_model_0.9.pt'
    torch.save(wrap(official(source)), path)
    torch.manual_seed(1)
    net = SegMamba(2, 3, SMALL, 12)
    net.load_pretrained(str(path))
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_state_dicts_of_either_names():
    source = small()
    for state in (official(source), source.state_dict()):
        torch.manual_seed(1)
        net = SegMamba(2, 3, SMALL, 12)
        assert not any(net.load_state_dict(state))
        assert torch.equal(net.decode_head.ups[3].up.weight, source.decode_head.ups[3].up.weight)
    around = torch.nn.Sequential(SegMamba(2, 3, SMALL, 12))
    around.load_state_dict({f'0.{k}': v for k, v in official(source).items()})
    assert torch.equal(around[0].backbone.norm2.fc1.bias, source.backbone.norm2.fc1.bias)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('out.conv.conv.bias'), 'decode_head.conv_seg.bias is missing'),
    (lambda s: s.pop('vit.mlps.1.fc1.bias'), 'backbone.norm1.fc1.bias is missing'),
    (lambda s: s.update({'decoder1.layer.conv1.conv.weight': torch.zeros(2)}), r'is \(2,\)'),
    (lambda s: s.update({'vit.more.weight': torch.zeros(2)}), 'more')])
def test_anything_else_is_refused(change, message, tmp_path):
    state, path = official(small()), tmp_path / 'a.pt'
    change(state)
    torch.save(state, path)
    net = small()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=message):
        net.load_pretrained(str(path))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
