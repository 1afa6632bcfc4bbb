"""The head of token labelling: its logits, its losses, and around it the classifier of a config."""

import pytest
import torch
import torch.nn.functional as F

from vmamba_mm.heads import TokenLabelHead
from vmamba_mm.models import RMT
from vmamba_mm.registry import MODELS
from vmamba_mm.testing import assert_close

RMT_ARCH = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 3),
                mlp_ratios=(2, 2, 2, 2))


@pytest.fixture
def head():
    torch.manual_seed(0)
    return TokenLabelHead(5, 6, 4, aux_weight=0.25).double()


@pytest.fixture
def maps():
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(2, 4, 3, 2, generator=rng).double(),
            torch.randn(2, 6, 3, 2, generator=rng).double())


def positions(head, last_map):
    return torch.stack([head.aux(last_map[:, :, h, w]) for h in range(3) for w in range(2)], 1)


def test_the_largest_logits_of_positions_are_added(head, maps):
    expected = head.fc(maps[1].mean((2, 3))) + 0.25 * positions(head, maps[0]).max(1).values
    assert_close(head(maps), expected, 1e-12)


def test_each_layer_has_a_loss(head, maps, mm):
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(label) for label in (3, 1)]
    losses, labels = head.loss(maps, samples), torch.tensor([3, 1])
    assert_close(losses['loss'], F.cross_entropy(head.fc(maps[1].mean((2, 3))), labels), 1e-12)
    of_positions = torch.stack([F.cross_entropy(logits, labels)
                                for logits in positions(head, maps[0]).unbind(1)])
    assert_close(losses['aux_loss'], 0.25 * of_positions.mean(), 1e-12)
    mixed = [DataSample().set_gt_score(F.one_hot(label, 5).double()) for label in labels]
    for name, value in head.loss(maps, mixed).items():
        assert_close(value, losses[name], 1e-12)
    smooth = MODELS.build(dict(
        type='vmamba_mm.TokenLabelHead', num_classes=5, in_channels=6, aux_channels=4,
        loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, num_classes=5)))
    assert smooth.double().loss(maps, samples)['aux_loss'] > 0


def test_predictions(head, maps, mm):
    from mmpretrain.structures import DataSample

    given = [DataSample(), DataSample()]
    for samples in (None, given):
        found = head.predict(maps, samples)
        assert_close(torch.stack([s.pred_score for s in found]), head(maps).softmax(1), 1e-12)
        assert [s.pred_label.item() for s in found] == head(maps).argmax(1).tolist()
    assert found == given


def test_a_classifier_of_a_config(mm):
    """As the page of RMT has it."""
    from mmengine.registry import init_default_scope
    from mmpretrain.structures import DataSample

    init_default_scope('mmpretrain')
    model = MODELS.build(dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='vmamba_mm.RMT', arch=RMT_ARCH, out_indices=(3,), projection=32,
                      with_last_map=True),
        head=dict(type='vmamba_mm.TokenLabelHead', num_classes=5, in_channels=32,
                  aux_channels=24)))
    assert isinstance(model.backbone, RMT)
    losses = model(torch.randn(2, 3, 64, 64),
                   [DataSample().set_gt_label(label) for label in (3, 1)], mode='loss')
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(torch.randn(1, 3, 64, 40)).shape == (1, 5)


@pytest.mark.parametrize('sizes', [(0, 6, 4), (5, 0, 4), (5, 6, -1)])
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match='at least 1, got'):
        TokenLabelHead(*sizes)
