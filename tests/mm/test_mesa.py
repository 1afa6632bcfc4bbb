"""The averaged model teaches the one that is trained."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmengine.dataset import DefaultSampler
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vmamba_mm.errors import UserError
from vmamba_mm.mm.hooks import ExactResumeHook, MESAHook

VALUE = 1.5


class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 5, 5, generator=rng), labels=index % 4)


class Classifier(BaseModel):
    """With a batch norm, whose statistics the averages have too, and dropout."""

    def __init__(self, dropout=0.0, pooled=True):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                                      nn.Dropout(dropout))
        self.head = nn.Linear(6, 4)
        self.pooled = pooled

    def forward(self, inputs, labels=None, mode='tensor'):
        y = self.backbone(inputs).movedim(1, -1)
        logits = self.head(y.mean((1, 2)) if self.pooled else y)
        if mode == 'loss':
            logits = logits if self.pooled else logits.mean((1, 2))
            return dict(loss_labels=F.cross_entropy(logits, labels))
        return logits


class Recorder(Hook):
    """What each step has added, and what it should: of copies of both models."""

    priority = 'LOW'

    def __init__(self):
        self.found, self.expected = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        averages = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model'))
        student = copy.deepcopy(runner.model).train()
        for module in student.modules():
            module._forward_hooks.clear()
        teacher = copy.deepcopy(averages.ema_model.module).eval()
        inputs = data_batch['inputs']
        with torch.no_grad():
            self.expected.append(VALUE * F.cross_entropy(
                student(inputs), teacher(inputs).softmax(-1)).item())

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs.get('loss_mesa')
        self.found.append(None if loss is None else loss.item())


def run(folder, hooks, model=None, epochs=4, by_epoch=True, resume=None, seed=1):
    torch.manual_seed(0)
    data = Noise()
    loader = DataLoader(data, 4, sampler=DefaultSampler(data, seed=0), drop_last=True)
    size = dict(by_epoch=True, max_epochs=epochs) if by_epoch else dict(
        by_epoch=False, max_iters=2 * epochs)
    runner = Runner(
        model or Classifier(), str(folder), loader,
        train_cfg=size, optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        custom_hooks=[dict(type='EMAHook', momentum=0.1, update_buffers=True), *hooks],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1 if by_epoch else 2,
                                           by_epoch=by_epoch), logger=None),
        load_from=resume and str(resume), resume=resume is not None,
        randomness=dict(seed=seed), log_level='ERROR', experiment_name=folder.name)
    runner.train()
    return runner


@pytest.mark.parametrize('by_epoch', [True, False])
def test_the_loss_begins_after_a_quarter(by_epoch, tmp_path):
    recorder = Recorder()
    runner = run(tmp_path / f'run{by_epoch}', [MESAHook(VALUE), recorder], by_epoch=by_epoch)
    assert recorder.found[:2] == [None, None]
    found = recorder.found[2:]
    assert found == pytest.approx(recorder.expected[2:], rel=1e-5) and len(found) == 6
    assert len(set(found)) == 6
    # Nothing of it stays behind, and evaluation never had it.
    assert not runner.model._forward_hooks and not runner.model.head._forward_hooks


def test_it_changes_what_is_learnt_from_its_beginning_on(tmp_path):
    weights = [run(tmp_path / name, hooks).model.state_dict()['head.weight']
               for name, hooks in (('plain', []), ('mesa', [MESAHook(VALUE)]),
                                   ('late', [MESAHook(VALUE, begin=0.99)]))]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize('by_epoch', [True, False])
def test_a_resumed_run_is_what_it_would_have_been(by_epoch, tmp_path):
    """With dropout, and resumed in the middle of the part with the loss."""
    def train(name, **kwargs):
        folder = tmp_path / f'{name}{by_epoch}'
        run(folder, [MESAHook(VALUE), ExactResumeHook()], Classifier(0.5), by_epoch=by_epoch,
            **kwargs)
        return folder

    last, middle = ('epoch_4.pth', 'epoch_2.pth') if by_epoch else ('iter_8.pth', 'iter_4.pth')
    straight = train('straight')
    resumed = train('resumed', resume=straight / middle)
    one, other = (torch.load(folder / last, weights_only=False) for folder in (straight, resumed))
    for part in ('state_dict', 'ema_state_dict'):
        assert all(map(torch.equal, one[part].values(), other[part].values())), part


def test_a_classifier_of_mmpretrain():
    """The hook's three calls, around a step on mixed images."""
    from mmpretrain.models import ImageClassifier
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    model = ImageClassifier(
        dict(type='vmamba_mm.VSSD', out_indices=(3,), arch=dict(
            embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), d_state=3)),
        dict(type='mmpretrain.GlobalAveragePooling'), dict(
            type='mmpretrain.LinearClsHead', num_classes=4, in_channels=32,
            loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
        train_cfg=dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)]),
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor', num_classes=4)).train()
    averages = EMAHook(update_buffers=True)
    hook = MESAHook(VALUE, begin=0.5)
    runner = SimpleNamespace(model=model, hooks=[averages, hook], iter=0, max_iters=2,
                             train_loop=None)
    averages.before_run(runner)
    hook.before_train(runner)
    data = dict(inputs=torch.randint(0, 255, (4, 3, 32, 32)),
                data_samples=[DataSample().set_gt_label(i) for i in range(4)])
    for runner.iter in range(2):  # noqa: B020
        hook.before_train_iter(runner, runner.iter)
        mixed = model.data_preprocessor(data, training=True)
        losses = model(**mixed, mode='loss')
        assert set(losses) == ({'loss', 'loss_mesa'} if runner.iter else {'loss'})
    wanted = averages.ema_model.module(mixed['inputs'], mode='tensor').softmax(-1)
    expected = VALUE * F.cross_entropy(model(mixed['inputs']), wanted)  # the same batch statistics
    assert losses['loss_mesa'].item() == pytest.approx(expected.item(), rel=1e-5)
    sum(losses.values()).backward()
    assert not any(p.requires_grad for p in averages.ema_model.parameters())
    assert set(model.eval()(**model.data_preprocessor(data), mode='predict')[0].keys()) >= {
        'pred_label'}


@pytest.mark.parametrize('arguments, message', [
    (dict(value=0), 'value of MESAHook.*above 0'), (dict(begin=1.0), 'begin of MESAHook.*below 1')])
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        MESAHook(**arguments)


def test_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="'fc' of the model.*Classifier has .*backbone, head"):
        run(tmp_path / 'a', [MESAHook(head='fc')])
    with pytest.raises(UserError, match=r"logits .*from 'head', got a tensor \(4, 3, 3, 4\)"):
        run(tmp_path / 'b', [MESAHook(begin=0)], Classifier(pooled=False))
    with pytest.raises(UserError, match='needs one EMAHook in custom_hooks.*has 2'):
        run(tmp_path / 'c', [dict(type='EMAHook'), MESAHook()])
