"""The recipes of VideoMamba: what they set, and that a small model trains and evaluates."""

import copy
import re

import pytest
import torch
from leaves import LEAVES, entry_of
from small_recipes import make_small, settings_of
from specs import SPECS

from vmamba_mm.mm.cli.runs import build_model

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/videomamba/')]
IMAGES = [leaf for leaf in ALL if '_in1k-' in leaf]
CLIPS = [leaf for leaf in ALL if leaf not in IMAGES]
SPEC = SPECS['videomamba']
#: (data set, model) -> rate for 256 samples, epochs, drop path, decay, of the scripts.
PUBLISHED = {
    ('k400', 'tiny'): (2e-4, 70, 0.1, 0.1), ('k400', 'small'): (2e-4, 50, 0.35, 0.05),
    ('k400', 'middle'): (1e-4, 50, 0.8, 0.05), ('k400', 'mask'): (1e-4, 45, 0.4, 0.05),
    ('ssv2', 'tiny'): (4e-4, 35, 0.1, 0.1), ('ssv2', 'small'): (4e-4, 30, 0.35, 0.05),
    ('ssv2', 'middle'): (4e-4, 30, 0.8, 0.05), ('ssv2', 'mask'): (1e-4, 30, 0.4, 0.05),
    ('breakfast', 'tiny'): (2e-4, 70, 0.1, 0.1), ('breakfast', 'small'): (2e-4, 50, 0.4, 0.05),
    ('breakfast', 'middle'): (2e-4, 50, 0.8, 0.05), ('breakfast', 'mask'): (2e-4, 45, 0.4, 0.05),
    ('coin', 'tiny'): (2e-4, 40, 0.1, 0.1), ('coin', 'small'): (2e-4, 35, 0.4, 0.05),
    ('coin', 'middle'): (2e-4, 30, 0.8, 0.05), ('coin', 'mask'): (2e-4, 30, 0.4, 0.05)}
#: data set -> classes, clips of a test
DATA = {'k400': (400, 4), 'ssv2': (174, 2), 'breakfast': (10, 4), 'coin': (180, 10)}
#: The same of models that continue at a larger size, by the first word of theirs: epochs, warm-up.
LARGER = {('k400', 'tiny'): (10, 2), ('k400', 'small'): (6, 1), ('k400', 'middle'): (6, 1),
          ('ssv2', 'tiny'): (10, 2), ('ssv2', 'small'): (10, 2), ('ssv2', 'middle'): (10, 2)}
#: size, resolution -> rate, clip, decay, drop path, epochs, warm-up, last rate
IMAGENET = {
    ('tiny', 224): (4e-3, 5.0, 0.1, 0.0, 300, 5, 1e-5),
    ('small', 224): (4e-3, None, 0.05, 0.15, 300, 5, 1e-5),
    ('middle', 224): (2e-3, 5.0, 0.05, 0.5, 300, 20, 5e-6),
    ('base', 224): (2e-3, 5.0, 0.05, 0.5, 300, 20, 5e-6),
    ('tiny', 448): (2e-5, None, 1e-8, 0.0, 30, 5, 5e-6),
    ('small', 448): (5e-6, None, 1e-8, 0.15, 30, 5, 5e-6),
    ('middle', 448): (5e-6, None, 1e-8, 0.5, 30, 5, 5e-6),
    ('tiny', 576): (1e-5, None, 1e-8, 0.0, 10, 2, 5e-6),
    ('small', 576): (5e-6, None, 1e-8, 0.15, 10, 2, 5e-6),
    ('middle', 576): (5e-6, None, 1e-8, 0.5, 10, 2, 5e-6)}


def parts_of(leaf):
    """size, whether from masked pre-training, GPUs, batch of each, data set, resolution."""
    found = re.search(r'videomamba-(\w+?)(?:-f\d+)?(-mask)?(?:-distill)?_(\d+)xb(\d+)_(\w+)-(\d+)',
                      leaf)
    size, mask, gpus, batch, data, side = found.groups()
    return size, bool(mask), int(gpus), int(batch), data, int(side)


@pytest.mark.parametrize('leaf', CLIPS)
def test_clips(leaf, load):
    cfg, entry = load(leaf), entry_of(leaf)
    size, mask, gpus, batch, data, side = parts_of(leaf)
    arch = SPEC.family.archs[entry.arch]
    assert arch['image_size'] == side and cfg.train_dataloader.batch_size == batch

    rate, epochs, drop_path, decay = PUBLISHED[data, 'mask' if mask else size]
    warmup = 5
    if (size, mask, data, arch['num_frames']) == ('middle', False, 'k400', 8):
        rate = 2e-4
    if side != 224:
        rate, decay, (epochs, warmup) = 5e-6, 1e-8, LARGER[data, size]
    steps = cfg.optim_wrapper.get('accumulative_counts', 1)
    assert (steps == 2) == (side == 384 and size != 'tiny')
    samples = 2 * gpus * batch * steps
    optimizer, (first, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    assert optimizer.lr == pytest.approx(rate * samples / 256)
    assert (optimizer.weight_decay, cfg.model.backbone.drop_path_rate) == (decay, drop_path)
    assert cfg.train_cfg.max_epochs == cosine.end == epochs and first.end == cosine.begin == warmup
    for factor in (first.start_factor, cosine.eta_min_ratio):
        assert rate * factor == pytest.approx(1e-6)

    train, val, test = (cfg[f'{kind}_dataloader'].dataset.pipeline
                        for kind in ('train', 'val', 'test'))
    assert {p[0].num_frames for p in (train, val, test)} == {arch['num_frames']}
    augment = {step.type: step for step in train[1].transforms[0].transforms}
    assert augment['vmamba_mm.RandomResizedCrop'].scale == side
    policy = augment['vmamba_mm.RandAugment']
    assert (policy.num_policies, policy.magnitude_level, policy.magnitude_std) == (
        (2, 5, 0.25) if size == 'tiny' else (4, 7, 0.5))
    assert ('vmamba_mm.RandomFlip' in augment) == (data != 'ssv2')
    resize, crop = val[1].transforms
    assert resize.scale == crop.crop_size == test[1].transforms[0].scale == side
    assert test[2].crop_size == side
    assert (cfg.model.head.num_classes, test[0].num_clips) == DATA[data]
    assert cfg.data_preprocessor.num_classes == cfg.model.head.num_classes
    roots = {cfg[f'{kind}_dataloader'].dataset.data_root for kind in ('train', 'val', 'test')}
    assert len(roots) == 1 and (roots == {'data/kinetics400'}) == (data == 'k400')


@pytest.mark.parametrize('leaf', IMAGES)
def test_images(leaf, load):
    cfg = load(leaf)
    size, _, gpus, batch, _, side = parts_of(leaf)
    rate, clip, decay, drop_path, epochs, warmup, last = IMAGENET[size, side]
    optim, (first, cosine) = cfg.optim_wrapper, cfg.param_scheduler
    assert (optim.optimizer.lr, optim.optimizer.weight_decay) == (rate, decay)
    assert (optim.clip_grad and optim.clip_grad.max_norm) == clip
    assert cfg.model.backbone.get('drop_path_rate', 0.0) == drop_path
    assert cfg.train_cfg.max_epochs == cosine.end == epochs and first.end == cosine.begin == warmup
    assert cosine.eta_min == last
    start = 5e-7 if side == 224 and size in ('middle', 'base') else 1e-6
    assert rate * first.start_factor == pytest.approx(start)
    assert cfg.train_dataloader.batch_size == batch and not cfg.custom_hooks

    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    _, resize, crop, _ = cfg.test_dataloader.dataset.pipeline
    assert train['RandomResizedCrop'].scale == crop.crop_size == side
    assert resize.scale == int(side / 0.875)
    assert ('AutoAugment' in train, 'RandAugment' in train) == (size == 'tiny', size != 'tiny')
    assert cfg.train_dataloader.sampler.type == (
        'DefaultSampler' if size == 'tiny' else 'RepeatAugSampler')


@pytest.mark.parametrize('leaf', [
    'configs/videomamba/videomamba-tiny-f8_8xb64_k400-224.py',
    'configs/videomamba/videomamba-middle-f16-mask_16xb16_ssv2-224.py'])
def test_decay_and_rates(leaf, load):
    """What is before the blocks hardly learns; A_log and A_b_log decay."""
    cfg = make_small(load(leaf))
    found, _ = settings_of(build_model(cfg), cfg)
    decay = cfg.optim_wrapper.optimizer.weight_decay
    less = pytest.approx(0.75 ** 25 if 'tiny' in leaf else 0.8 ** 33)
    for name in ('spatial_pos_embed', 'cls_token', 'patch_embed.proj.bias'):
        assert found.pop(f'backbone.{name}') == (less, 0), name
    assert found.pop('backbone.patch_embed.proj.weight') == (less, decay)
    assert found.pop('backbone.temporal_pos_embed') == (1, 0)
    assert found['backbone.blocks.0.mixer.A_b_log'] == (1, decay)
    model = build_model(cfg)
    assert found == {name: (1, 0 if p.ndim == 1 or name.endswith('.bias') else decay)
                     for name, p in model.named_parameters() if name in found}


def data_of(shape):
    from mmpretrain.structures import DataSample

    return dict(inputs=torch.randint(0, 255, shape, dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(i) for i in (1, 3)])


def step_and_evaluate(model, cfg, data):
    model.init_weights()
    _, wrapper = settings_of(model, cfg)
    before = model.backbone.cls_token.detach().clone()
    logs = model.train_step(copy.deepcopy(data), wrapper)
    assert logs['loss'].isfinite() and not torch.equal(model.backbone.cls_token, before)
    with torch.no_grad():
        first, second = (model.eval().val_step(copy.deepcopy(data)) for _ in range(2))
    for sample, same in zip(first, second, strict=True):
        assert sample.pred_score.shape == (5,) and sample.pred_score.sum() == pytest.approx(1)
        assert torch.equal(sample.pred_score, same.pred_score)
    return logs


@pytest.mark.parametrize('leaf', [
    'configs/videomamba/videomamba-tiny-f8_8xb64_k400-224.py',
    'configs/videomamba/videomamba-small-f16_16xb12_ssv2-288.py'])
def test_a_step_and_an_evaluation_on_clips(leaf, load):
    torch.manual_seed(0)
    cfg = make_small(load(leaf))
    cfg.model.head.init_cfg = None  # of the files that it continues from
    step_and_evaluate(build_model(cfg), cfg, data_of((2, 2, 3, 2, 16, 16)))


@pytest.mark.parametrize('leaf', [
    'configs/videomamba/videomamba-tiny_8xb512_in1k-224.py',
    'configs/videomamba/videomamba-middle-distill_16xb128_in1k-224.py'])
def test_a_step_and_an_evaluation_on_images(leaf, load):
    torch.manual_seed(0)
    cfg, distills = make_small(load(leaf), SPEC.archs['image']), 'distill' in leaf
    if distills:
        cfg.model.teacher.update(arch=dict(SPEC.archs['image'], embed_dims=12), init_cfg=None)
    model = build_model(cfg)
    logs = step_and_evaluate(model, cfg, data_of((2, 3, 16, 16)))
    assert ('loss_features' in logs) == distills
    if distills:
        assert not [name for name in model.state_dict() if 'teacher' in name]
        assert model.distill_head[1].out_features == 12


def test_self_distillation_needs_tokens(load):
    cfg = make_small(load('configs/videomamba/videomamba-base-distill_16xb128_in1k-224.py'),
                     SPEC.archs['image'])
    cfg.model.teacher.update(arch=dict(SPEC.archs['image']), init_cfg=None, out_type='cls_token')
    with pytest.raises(ValueError, match="the teacher of SelfDistillation needs out_type='raw'"):
        build_model(cfg)
    cfg.model.neck = dict(type='GlobalAveragePooling')
    with pytest.raises(ValueError, match='need no neck'):
        build_model(cfg)


def test_auto_augment(load):
    """timm's policies 'v0', with the numbers that it computes from the levels."""
    from timm.data.auto_augment import LEVEL_TO_ARG, auto_augment_policy_v0

    policies = load('configs/videomamba/videomamba-tiny_8xb512_in1k-224.py').policies
    theirs = auto_augment_policy_v0(dict(translate_pct=0.45, translate_const=250))
    assert len(policies) == len(theirs) == 25
    for pair, wanted in zip(policies, theirs, strict=True):
        for ours, op in zip(pair, wanted, strict=True):
            level_to_arg = LEVEL_TO_ARG[op.name]
            args = level_to_arg(op.magnitude, dict(translate_pct=0.45)) if level_to_arg else ()
            number = next((ours[key] for key in ('magnitude', 'angle', 'thr', 'bits')
                           if key in ours), None)
            number = number + 1 if ours.type == 'ColorTransform' else number
            assert ours.prob == op.prob and (number is None) == (not args)
            assert not args or abs(number) == pytest.approx(abs(args[0])), (ours, op)
            axis = 'X' if ours.get('direction') == 'horizontal' else 'Y'
            names = {'ColorTransform': 'Color', 'Shear': f'Shear{axis}',
                     'Translate': f'Translate{axis}Rel'}
            assert names.get(ours.type, ours.type) == op.name


@pytest.mark.parametrize('leaf, kind', [
    ('configs/videomamba/videomamba-tiny_8xb256_in1k-448.py', 'image'),
    ('configs/videomamba/videomamba-small-f16_16xb12_ssv2-288.py', 'clip'),
    ('configs/videomamba/videomamba-small-f8_8xb64_k400-224.py', 'image')])
def test_starts(leaf, kind, load, tmp_path, monkeypatch):
    """From an official file of the smaller size, head included, or from one of images."""
    source = SPEC.random_model(SPEC.archs[kind])
    state, = SPEC.official_classifiers(source, 5)
    torch.save(dict(model=state), tmp_path / 'a.pth')
    monkeypatch.setattr('vmamba_mm.checkpoints.files.weights_of',
                        lambda name: str(tmp_path / 'a.pth'))
    cfg, published = load(leaf), load(leaf).model
    inflates = 'f8' in leaf
    arch = SPEC.archs['clip'] if inflates else dict(SPEC.archs[kind], image_size=12)
    cfg = make_small(cfg, arch)
    cfg.model.backbone.init_cfg = published.backbone.init_cfg
    model = build_model(cfg)
    model.init_weights()
    ours, theirs = model.backbone.state_dict(), source.state_dict()
    assert torch.equal(ours[SPEC.a_weight], theirs[SPEC.a_weight])
    assert torch.equal(ours['spatial_pos_embed'], theirs['spatial_pos_embed']) == inflates
    assert torch.equal(model.head.fc.weight, state['head.weight']) != inflates
