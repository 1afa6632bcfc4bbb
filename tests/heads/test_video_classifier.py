"""The classifier of clips: preprocessing, mixing, views."""

import numpy as np
import pytest
import torch
from torch import nn

from vmamba_mm.heads import ClipPreprocessor, VideoClassifier
from vmamba_mm.registry import MODELS


@MODELS.register_module()
class MeanColour(nn.Module):
    """A backbone of clips: the mean of each channel over time and space."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.batches = []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        return (x.mean((2, 3, 4)) * self.scale,)

    def get_layer_depth(self, name, prefix):
        return 0, 2


@pytest.fixture
def samples(mm):
    from mmpretrain.structures import DataSample

    return lambda *labels: [DataSample().set_gt_label(label) for label in labels]


@pytest.fixture
def classifier(mm):
    from mmengine.registry import init_default_scope

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = VideoClassifier(
        backbone=dict(type='vmamba_mm.MeanColour'),
        head=dict(type='LinearClsHead', num_classes=4, in_channels=3,
                  loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
        data_preprocessor=dict(num_classes=4, mean=[127.5] * 3, std=[127.5] * 3),
        train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
    model.init_weights()
    with torch.no_grad():
        model.head.fc.weight.mul_(100)  # scores that differ
    return model


def test_normalised_as_images_are(mm):
    clips = torch.randint(0, 255, (2, 3, 3, 4, 5, 6), dtype=torch.uint8)
    preprocessor = ClipPreprocessor(mean=[1., 2., 3.], std=[4., 5., 6.], to_rgb=True)
    for inputs in (clips, list(clips)):
        done = preprocessor(dict(inputs=inputs))['inputs']
        assert done.shape == clips.shape
        for channel, (mean, std) in enumerate(((1, 4), (2, 5), (3, 6))):
            torch.testing.assert_close(done[:, :, channel],
                                       (clips[:, :, 2 - channel].float() - mean) / std)
    assert (ClipPreprocessor()(dict(inputs=clips))['inputs'] == clips).all()


@pytest.mark.parametrize('settings, message', [
    (dict(mean=[1, 2, 3]), 'mean and std belong together'),
    (dict(batch_augments=dict(augments=[dict(type='Mixup', alpha=1.)])), 'num_classes.*missing')])
def test_wrong_settings(mm, settings, message):
    with pytest.raises(ValueError, match=message):
        ClipPreprocessor(**settings)


def test_images_are_no_clips(mm):
    with pytest.raises(ValueError, match=r'\(V, C, T, H, W\).*got \(3, 8, 8\)'):
        ClipPreprocessor()(dict(inputs=torch.zeros(2, 3, 8, 8)))


def test_views_are_samples_in_training(samples):
    clips = torch.arange(2 * 3).view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 2, 4, 4)
    done = ClipPreprocessor()(dict(inputs=clips, data_samples=samples(5, 6)), training=True)
    assert done['inputs'].shape == (6, 3, 2, 4, 4)
    assert done['inputs'][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [sample.gt_label.item() for sample in done['data_samples']] == [5, 5, 5, 6, 6, 6]


@pytest.mark.parametrize('augment', [dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.)])
def test_clips_are_mixed_as_their_labels_are(samples, augment):
    """A clip is as much of each colour as its soft label says, and all frames are mixed alike."""
    torch.manual_seed(0)
    np.random.seed(0)  # of the shares
    clips = torch.zeros(4, 2, 3, 5, 16, 16)
    for i in range(3):
        clips[i, :, i] = 1
    preprocessor = ClipPreprocessor(num_classes=4, batch_augments=dict(augments=[augment]))
    done = preprocessor(dict(inputs=clips, data_samples=samples(0, 1, 2, 3)), training=True)
    mixed = done['inputs']
    scores = torch.stack([sample.gt_score for sample in done['data_samples']])
    assert scores.shape == (8, 4) and (mixed == mixed[:, :, :1]).all()
    torch.testing.assert_close(mixed.mean((2, 3, 4)), scores[:, :3], rtol=0, atol=1e-5)
    assert ((scores > 0).sum(1) == 2).any()
    torch.testing.assert_close(scores.sum(1), torch.ones(8))


def test_a_training_step(classifier, samples):
    torch.manual_seed(0)
    clips = torch.randint(0, 255, (2, 2, 3, 4, 8, 8), dtype=torch.uint8)
    data = classifier.data_preprocessor(dict(inputs=clips, data_samples=samples(0, 3)), True)
    losses = classifier(**data, mode='loss')
    losses['loss'].backward()
    assert classifier.backbone.batches == [(4, 3, 4, 8, 8)]
    assert classifier.backbone.scale.grad.abs().max() > 0
    assert classifier.get_layer_depth('backbone.scale') == (0, 2)


def test_scores_of_views_are_averaged(classifier, samples):
    classifier.eval()
    clips = torch.randint(0, 255, (2, 3, 3, 4, 8, 8), dtype=torch.uint8)
    data = dict(inputs=clips, data_samples=samples(0, 3))
    with torch.no_grad():
        results = classifier.test_step(data)
        inputs = (clips.float() - 127.5) / 127.5
        logits = classifier(inputs.flatten(0, 1), mode='tensor')
        assert classifier.backbone.batches == [(2, 3, 4, 8, 8)] * 3 + [(6, 3, 4, 8, 8)]
    expected = logits.softmax(1).view(2, 3, 4).mean(1)
    assert len(results) == 2
    for result, score, label in zip(results, expected, (0, 3), strict=True):
        torch.testing.assert_close(result.pred_score, score)
        assert result.pred_label.tolist() == [score.argmax()]
        assert result.gt_label.tolist() == [label]
    with torch.no_grad():  # without labels
        for result, score in zip(classifier(inputs, mode='predict'), expected, strict=True):
            torch.testing.assert_close(result.pred_score, score)


def test_modes(classifier):
    with pytest.raises(ValueError, match="mode must be 'tensor', 'loss' or 'predict'"):
        classifier(torch.zeros(1, 3, 2, 4, 4), mode='logits')
