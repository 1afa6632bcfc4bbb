"""Farthest points, neighbours, Hilbert curves and distances of clouds."""

import itertools

import pytest
import torch

from vmamba_mm.ops.points import (
    AUGMENTS,
    CURVES,
    chamfer_distance,
    curve_order,
    farthest_points,
    group_points,
    hilbert_code,
    interpolate_points,
    nearest_points,
    take_points,
)
from vmamba_mm.ops.points.hilbert import code_by_levels


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    return request.param


def farthest_by_hand(points, num):
    """The rule of pointnet2_ops, point by point."""
    count = len(points)
    threads = min(512, 1 << (count.bit_length() - 1))
    order = sorted(range(count), key=lambda k: (k % threads, k))
    nearest, chosen = [1e10] * count, [0]
    for _ in range(num - 1):
        best, which = -1.0, 0
        for k in order:
            if points[k].square().sum() > 1e-3:
                distance = (points[k] - points[chosen[-1]]).square().sum().item()
                nearest[k] = min(nearest[k], distance)
                if nearest[k] > best:
                    best, which = nearest[k], k
        chosen.append(which)
    return chosen


@pytest.mark.parametrize('count', [1, 2, 3, 7, 8, 13, 70, 600])
def test_farthest_points_and_their_ties(count, device):
    """On a coarse grid, where many are equally far, with points at the origin, and more than there
    are."""
    torch.manual_seed(count)
    points = torch.randint(-2, 3, (2, count, 3)).float() / 2
    num = min(count, 12) + 3
    found = farthest_points(points.to(device), num).cpu()
    assert found.tolist() == [farthest_by_hand(cloud, num) for cloud in points]


def test_points_of_other_dtypes_and_columns(device):
    points = torch.randn(2, 40, 3, device=device).half()
    wanted = farthest_points(points.double(), 9)
    assert torch.equal(farthest_points(points, 9), wanted)
    assert torch.equal(farthest_points(torch.cat([points, 9 * points], 2), 9), wanted)
    centres, indices = group_points(points.float(), 9, 5)
    assert torch.equal(centres, wanted) and torch.equal(indices[..., 0], wanted)


def test_nearest_points(device):
    points, queries = torch.randn(2, 30, 3), torch.randn(2, 7, 3)
    exact = torch.cdist(queries.double(), points.double()).argsort(2)[..., :6]
    found = nearest_points(points.to(device), queries.to(device), 6)
    assert torch.equal(found.cpu(), exact)
    with pytest.raises(ValueError, match='there are 30 points, of which 31 cannot be nearest'):
        nearest_points(points, queries, 31)
    # Far from the origin the expanded square would cancel.
    line = torch.linspace(0, 1, 20).view(1, 20, 1) * torch.tensor([1e-3, 0, 0]) + 100
    assert nearest_points(line, line[:, :1], 3).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_a_hilbert_curve_goes_from_cell_to_neighbour(depth, device):
    side = range(1 << depth)
    cells = torch.tensor(list(itertools.product(side, side, side)), device=device)
    code = hilbert_code(cells, depth)
    assert sorted(code.tolist()) == list(range(8 ** depth))
    path = cells[code.argsort()]
    assert (path.diff(dim=0).abs().sum(1) == 1).all()
    # Once every three levels the axes have the same roles.
    assert torch.equal(hilbert_code(cells, depth + 3), code)
    assert not torch.equal(hilbert_code(cells, depth + 1), code)


@pytest.mark.parametrize('depth', [1, 2, 3, 7, 19, 20, 21])
def test_the_automaton_gives_the_codes_of_the_algorithm(depth, device):
    cells = torch.randint(0, 1 << depth, (3, 50, 3), device=device)
    assert torch.equal(hilbert_code(cells, depth), code_by_levels(cells, depth))


def test_the_order_of_a_cloud_alone_and_in_a_batch(device):
    """By default it is the same, and that of the batch of the public code for the unit sphere."""
    torch.manual_seed(0)
    cloud = torch.randn(1, 40, 3, device=device)
    cloud /= cloud.norm(dim=2).max()
    both = torch.cat([cloud, 2 * cloud])
    for curve in CURVES:
        alone = {depth: curve_order(cloud, curve, depth=depth) for depth in
                 ('fixed', 'cloud', 'batch')}
        batch = {depth: curve_order(both, curve, depth=depth) for depth in alone}
        for depth in ('fixed', 'cloud'):
            assert torch.equal(batch[depth].order[:1], alone[depth].order)
        assert not torch.equal(batch['batch'].order[:1], alone['batch'].order)
        assert alone['cloud'].depth.item() == 7 and batch['batch'].depth.tolist() == [8, 8]
        assert torch.equal(alone['fixed'].order, alone['cloud'].order)
    swapped = curve_order(cloud[..., [1, 0, 2]], 'hilbert').order
    assert torch.equal(curve_order(cloud, 'hilbert-trans').order, swapped)


def test_cells_that_coincide_and_that_are_far(device):
    points = torch.zeros(1, 6, 3, device=device)
    for depth in ('fixed', 'cloud', 'batch'):
        assert curve_order(points, depth=depth).order.flatten().tolist() == list(range(6))
    points[0, 3] = 1e6  # beyond the last cell
    assert sorted(curve_order(points).order.flatten().tolist()) == list(range(6))
    for wrong, message in ((dict(curve='z'), "curve='z'.*'hilbert', 'hilbert-trans'"),
                           (dict(depth=7), "depth=7.*'fixed', 'cloud', 'batch'")):
        with pytest.raises(ValueError, match=message):
            curve_order(points, **wrong)


def test_chamfer_distance():
    first = torch.randn(3, 5, 3, dtype=torch.double, requires_grad=True)
    second = torch.randn(3, 7, 3, dtype=torch.double, requires_grad=True)
    distances = torch.cdist(first, second)
    there, back = distances.amin(2), distances.amin(1)
    torch.testing.assert_close(chamfer_distance(first, second),
                               there.square().mean() + back.square().mean())
    torch.testing.assert_close(chamfer_distance(first, second, 'cdl1'),
                               (there.mean() + back.mean()) / 2)
    for kind in ('cdl1', 'cdl2'):
        assert torch.autograd.gradcheck(lambda a, b, k=kind: chamfer_distance(a, b, k),
                                        (first, second))
    chamfer_distance(first, first.detach(), 'cdl1').backward()
    assert first.grad.isfinite().all()
    with pytest.raises(ValueError, match="choose 'cdl1' or 'cdl2'"):
        chamfer_distance(first, second, 'emd')


def test_interpolation():
    centres = torch.randn(2, 6, 3, dtype=torch.double)
    features = torch.randn(2, 6, 4, dtype=torch.double)
    for num in (1, 3):
        torch.testing.assert_close(interpolate_points(features, centres, centres, num), features,
                                   rtol=0, atol=1e-4)
    points = torch.randn(2, 9, 3, dtype=torch.double)
    distances = torch.cdist(points, centres).square()
    nearest, which = distances.topk(3, largest=False)
    weights = (1 / nearest) / (1 / nearest).sum(2, keepdim=True)
    wanted = (take_points(features, which) * weights.unsqueeze(3)).sum(2)
    torch.testing.assert_close(interpolate_points(features, centres, points, 3), wanted,
                               rtol=1e-4, atol=1e-4)


def test_augments(device):
    torch.manual_seed(0)
    points = torch.randn(4, 50, 5, device=device)
    for axis in 'xyz':
        turned = AUGMENTS['rotate'](points, axis)
        torch.testing.assert_close(turned[..., :3].norm(dim=2), points[..., :3].norm(dim=2))
        along = 'xyz'.index(axis)
        assert torch.equal(turned[..., along], points[..., along])
        other = (along + 1) % 3
        factors = turned[:, 0, other] / points[:, 0, other]
        assert len(set(factors.tolist())) == 4  # of each cloud by itself
    scaled = AUGMENTS['scale_shift'](points, scale=(0.5, 2), shift=0)[..., :3] / points[..., :3]
    assert 0.49 < scaled.min() and scaled.max() < 2.01 and scaled[0, 0].std() > 1e-3
    torch.testing.assert_close(scaled, scaled[:, :1].expand_as(scaled))
    same = AUGMENTS['scale_shift'](points, shift=0, per_axis=False)[..., :3] / points[..., :3]
    torch.testing.assert_close(same, same[:, :1, :1].expand_as(same))
    moved = AUGMENTS['jitter'](points, std=1, clip=0.1) - points
    assert moved.abs().max() <= 0.1 + 1e-6 and moved[..., 3:].abs().max() == 0
