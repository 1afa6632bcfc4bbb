"""The head that adds the logits of all stages, and the classifier that learns from a teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vmamba_mm.heads import HardDistillation, StageFusionHead
from vmamba_mm.registry import MODELS
from vmamba_mm.testing import assert_close

ARCH = dict(embed_dims=(8, 12, 16), depths=(1, 1, 1), d_state=(6, 4, 3))


@pytest.fixture
def feats():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, generator=rng).double(), torch.randn(
        2, 6, 3, 2, generator=rng).double()


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = StageFusionHead(5, (4, 6), distilled=True, alpha=0.25).double()
    head.weights.data = torch.tensor([0.0, 3.0]).double().log1p()  # softmax 1/5 and 4/5
    head.weights_dist.data = torch.tensor([2.0, 0.0]).double().log1p()  # 3/4 and 1/4
    return head


def logits_by_hand(head, feats):
    means = feats[0].mean(2), feats[1].mean((2, 3))
    return (head.fc[0](means[0]) / 5 + head.fc[1](means[1]) * 4 / 5,
            head.fc_dist[0](means[0]) * 3 / 4 + head.fc_dist[1](means[1]) / 4)


def test_logits_of_all_features_are_added(head, feats):
    plain = StageFusionHead(5, (4, 6)).double()
    plain.load_state_dict({k: v for k, v in head.state_dict().items() if '_dist' not in k})
    ours, teachers = logits_by_hand(head, feats)
    assert_close(plain(feats), ours, 1e-12)
    assert_close(head(feats), (ours + teachers) / 2, 1e-12)


def test_one_set_learns_the_labels_and_one_the_teacher(head, feats, mm):
    from mmpretrain.structures import DataSample

    labels, teacher = torch.tensor([3, 1]), torch.tensor([[0., 1, 0, 0, 9], [8, 0, 0, 2, 0]])
    ours, teachers = logits_by_hand(head, feats)
    for samples in ([DataSample().set_gt_label(label) for label in labels],
                    [DataSample().set_gt_score(F.one_hot(label, 5).double()) for label in labels]):
        losses = head.loss(feats, samples, teacher=teacher)
        assert_close(losses['loss'], 0.75 * F.cross_entropy(ours, labels), 1e-12)
        assert_close(losses['loss_teacher'],
                     0.25 * F.cross_entropy(teachers, torch.tensor([4, 0])), 1e-12)
    with pytest.raises(ValueError, match='it is the head of HardDistillation.*distilled=True'):
        head.loss(feats, samples)
    plain = StageFusionHead(5, (4, 6)).double()
    assert set(plain.loss(feats, samples)) == {'loss'}
    with pytest.raises(ValueError, match='no other one does.*distilled=False'):
        plain.loss(feats, samples, teacher=teacher)


@pytest.mark.parametrize('options, message', [
    (dict(num_classes=0), 'num_classes must be at least 1.*got 0'),
    (dict(in_channels=6), 'in_channels a list of channels.* and 6'),
    (dict(in_channels=(6, 0)), r'at least 1, got 5 and \(6, 0\)'),
    (dict(alpha=2), 'alpha must be from 0 to 1, got 2')])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        StageFusionHead(**{'num_classes': 5, 'in_channels': (4, 6), **options})


# --- learning from a teacher ----------------------------------------------------------------------

@MODELS.register_module()
class ClassOfTheBrightest(nn.Module):
    """A teacher without weights of its own to load: the class is the brightest channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.is_loaded = False

    def init_weights(self):
        self.is_loaded = True

    def forward(self, x):
        return F.pad(self.scale * x.mean((2, 3)), (0, 2))


@pytest.fixture
def settings():
    return dict(
        backbone=dict(type='vmamba_mm.EfficientViM', arch=ARCH, out_indices=(2,), with_states=True),
        head=dict(type='vmamba_mm.StageFusionHead', num_classes=5, in_channels=(8, 12, 16, 16),
                  distilled=True),
        teacher=dict(type=ClassOfTheBrightest),
        data_preprocessor=dict(num_classes=5, mean=[0.0] * 3, std=[1.0] * 3))


def test_hard_distillation(settings, mm):
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    model = HardDistillation(**settings)
    model.init_weights()
    assert model.teacher.is_loaded and not any('teacher' in k for k in model.state_dict())
    assert not model.teacher.training and not model.teacher.scale.requires_grad
    images = torch.rand(2, 3, 64, 64)
    images[0, 2] += 1
    images[1, 1] += 1
    samples = [DataSample().set_gt_label(label) for label in (3, 1)]
    losses = model(images, samples, mode='loss')
    feats = model.backbone(images)
    wanted = model.head.loss(feats, samples, teacher=F.one_hot(torch.tensor([2, 1]), 5).float())
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(images), model.head(model.backbone(images)))
    assert len(model(images, samples, mode='predict')) == 2
    with pytest.raises(ValueError, match="mode must be 'tensor', 'loss' or 'predict', got 'x'"):
        model(images, mode='x')
    with pytest.raises(ValueError, match='without a neck'):
        HardDistillation(**settings, neck=dict(type='GlobalAveragePooling'))


def test_teacher_of_timm(monkeypatch):
    import timm.models

    loaded = []
    monkeypatch.setattr(timm.models, 'load_pretrained', loaded.append)
    teacher = MODELS.build(dict(type='vmamba_mm.TimmTeacher', model_name='resnet10t.c3_in1k'))
    assert not loaded
    teacher.init_weights()
    assert loaded == [teacher.model] and loaded[0].pretrained_cfg['tag'] == 'c3_in1k'
    assert teacher.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
