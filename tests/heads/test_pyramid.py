import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.heads import SimpleFeaturePyramid


def norm_by_hand(x, norm):
    moved = x.movedim(1, -1)
    mean, var = moved.mean(-1, keepdim=True), moved.var(-1, correction=0, keepdim=True)
    return ((moved - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias).movedim(-1, 1)


@pytest.mark.parametrize('size', [(2, 3), (7, 6)], ids=str)
def test_levels_are_vitdets(size):
    """Names are detectron2's; each level by hand, in fp64."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(8, 6).double()
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    weights, x = dict(pyramid.named_parameters()), torch.randn(2, 8, *size, dtype=torch.float64)
    assert {'simfp_2.0.weight', 'simfp_2.1.bias', 'simfp_2.3.bias', 'simfp_2.5.norm.weight',
            'simfp_3.2.weight', 'simfp_4.0.norm.bias', 'simfp_5.1.weight'} <= set(weights)

    def grow(x, name):
        return F.conv_transpose2d(x, weights[f'{name}.weight'], weights[f'{name}.bias'], 2)

    halves = pyramid.simfp_2[1]
    steps = {2: grow(F.gelu(norm_by_hand(grow(x, 'simfp_2.0'), halves)), 'simfp_2.3'),
             3: grow(x, 'simfp_3.0'), 4: x, 5: F.max_pool2d(x, 2)}
    expected = []
    for level, y in steps.items():
        for conv in list(getattr(pyramid, f'simfp_{level}'))[-2:]:
            y = norm_by_hand(F.conv2d(y, conv.weight, padding=conv.kernel_size[0] // 2), conv.norm)
        expected.append(y)
    expected.append(expected[-1][..., ::2, ::2])
    for maps in (pyramid(x), pyramid((None, x))):
        assert isinstance(maps, tuple) and all(y.is_contiguous() for y in maps)
        torch.testing.assert_close(maps, tuple(expected))
    assert [tuple(y.shape[2:]) for y in expected[:3]] == [
        tuple(scale * side for side in size) for scale in (4, 2, 1)]


@pytest.mark.parametrize('channels', [2, 10])
def test_channels(channels):
    with pytest.raises(ValueError, match=f'a multiple of 4, got {channels}'):
        SimpleFeaturePyramid(channels)
