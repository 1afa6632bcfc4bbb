"""The published recipes of VMamba: decay, schedules, run settings, data pipelines."""

import math
import re

import numpy as np
import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates

from vmamba_mm import zoo

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/vmamba/')]
IMAGENET, COCO, ADE20K = ([leaf for leaf in ALL if entry_of(leaf).task == task]
                          for task in ('cls', 'det', 'seg'))
COCO_1X = 'configs/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py'
COCO_3X = 'configs/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_ms-3x_coco.py'
COCO_BS8 = 'configs/vmamba/mask-rcnn_vmamba-base-s2l15_fpn_8xb1-1x_coco.py'
#: The scope lets the tests of one leaf follow one another, so that its model is built once.
each_dense = pytest.mark.parametrize('leaf', COCO + ADE20K, scope='module')
#: arch -> drop path on ImageNet, COCO, ADE20K
DROP_PATH = {
    'vanilla_tiny': (0.1, 0.2, 0.3), 'vanilla_small': (0.3, 0.2, 0.3),
    'vanilla_base': (0.6, 0.2, 0.3), 'tiny_s2l5': (0.2, 0.2, 0.2), 'small_s2l15': (0.3, 0.3, 0.3),
    'base_s2l15': (0.6, 0.6, 0.6), 'tiny_s1l8': (0.2, 0.2, 0.2), 'small_s1l20': (0.3,),
    'base_s1l20': (0.5,),
}


def test_published_rows_and_no_others():
    """The tasks of each, and the five of the long schedule."""
    assert {entry_of(leaf).arch for leaf in IMAGENET} == set(DROP_PATH)
    dense = {arch for arch, rates in DROP_PATH.items() if len(rates) == 3}
    assert {entry_of(leaf).arch for leaf in ADE20K} == dense
    assert {entry_of(leaf).arch for leaf in COCO if '_fpn_1x' in leaf} == dense
    assert {entry_of(leaf).arch for leaf in COCO if 'ms-3x' in leaf} == {
        'vanilla_tiny', 'vanilla_small', 'tiny_s2l5', 'small_s2l15', 'tiny_s1l8'}
    assert len(COCO) == 7 + 5 + 1 and COCO_BS8 in COCO


@pytest.mark.parametrize('leaf', ALL)
def test_drop_path(leaf, load):
    entry = entry_of(leaf)
    task = ['cls', 'det', 'seg'].index(entry.task)
    assert load(leaf).model.backbone.drop_path_rate == DROP_PATH[entry.arch][task]


@each_dense
def test_dense_backbone_is_the_classifier_with_norms(leaf, build_meta):
    """Less its head, plus a norm for each of the first three stages."""
    backbone = build_meta(leaf).backbone
    classifier = zoo.entries('vmamba', entry_of(leaf).arch, 'cls')[0].parameters
    dims = backbone.num_features
    expected = classifier - (dims[3] * 1000 + 1000) + 2 * sum(dims[:3])
    assert sum(p.numel() for p in backbone.parameters()) == expected


# -- optimizer -----------------------------------------------------------------------------

def decays(model, cfg):
    """{parameter name: weight decay} as the optimizer of the config applies it."""
    from mmengine.optim import build_optim_wrapper
    optim_cfg = cfg.optim_wrapper.copy()
    optim_cfg.type = 'OptimWrapper'  # the Amp one refuses a machine without a GPU
    wrapper = build_optim_wrapper(model, optim_cfg)
    of_id = {}
    for group in wrapper.optimizer.param_groups:
        assert group['lr'] == cfg.optim_wrapper.optimizer.lr
        of_id.update((id(p), group['weight_decay']) for p in group['params'])
    return {name: of_id[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet_decay(leaf, load, build_meta):
    cfg = load(leaf)
    model = build_meta(leaf)
    found = decays(model, cfg)
    expected = {
        name: 0. if p.ndim == 1 or name.endswith('.bias') else 0.05
        for name, p in model.named_parameters()
    }
    assert found == expected

    ssm = 'backbone.stages.0.blocks.0.ssm'
    for leaf in ('A_logs', 'dt_projs_weight', 'dt_projs_bias', 'x_proj_weight'):
        assert found[f'{ssm}.{leaf}'] == 0.05, leaf
    for name in (f'{ssm}.Ds', f'{ssm}.out_norm.weight', f'{ssm}.out_norm.bias',
                 'backbone.stages.0.blocks.0.norm1.weight', 'head.fc.bias'):
        assert found[name] == 0., name

    optim = cfg.optim_wrapper
    assert optim.type == 'AmpOptimWrapper' and optim.clip_grad == dict(max_norm=5.0)
    assert optim.optimizer.type == 'AdamW' and optim.optimizer.lr == 1e-3
    assert optim.optimizer.betas == (0.9, 0.999) and optim.optimizer.eps == 1e-8


# Our names -> those of the released detection and segmentation models, as far as the
# published rule ('norm' in the name: no decay) can tell them apart.
OFFICIAL = [
    (r'patch_embed\.norm\d?', 'patch_embed.2'),
    (r'(stages\.\d)\.downsample\.norm', r'\1.downsample.3'),
    (r'\.norm1\.', '.norm.'),
    (r'backbone\.norm(\d)', r'backbone.outnorm\1'),
]


@each_dense
def test_dense_decay(leaf, load, build_meta):
    cfg = load(leaf)
    model = build_meta(leaf)
    wd, lr = (0.05, 1e-4) if leaf in COCO else (0.01, 6e-5)
    vanilla = 'vanilla' in leaf

    def official(name):
        for ours, theirs in OFFICIAL:
            if vanilla and 'downsample' in theirs:
                continue  # PatchMerging called it norm
            name = re.sub(ours, theirs, name)
        return name

    found = decays(model, cfg)
    assert found == {name: 0. if 'norm' in official(name) else wd for name in found}

    ssm = 'backbone.stages.0.blocks.0.ssm'
    for name in (f'{ssm}.A_logs', f'{ssm}.Ds', f'{ssm}.dt_projs_bias'):
        assert found[name] == wd, name
    for name in (f'{ssm}.out_norm.weight', 'backbone.norm0.weight', 'backbone.norm3.bias',
                 'backbone.stages.0.blocks.0.norm1.weight'):
        assert found[name] == 0., name
    stem_norm = 'patch_embed.norm' if vanilla else 'patch_embed.norm2'
    assert found[f'backbone.{stem_norm}.weight'] == wd
    assert found['backbone.stages.0.downsample.norm.weight'] == (0. if vanilla else wd)

    optim = cfg.optim_wrapper
    assert optim.type == 'OptimWrapper' and optim.get('clip_grad') is None
    assert optim.optimizer.type == 'AdamW' and optim.optimizer.lr == lr
    assert optim.optimizer.weight_decay == wd and optim.optimizer.betas == (0.9, 0.999)


# -- schedule ------------------------------------------------------------------------------

@pytest.mark.parametrize('leaf', [leaf for leaf in IMAGENET if 'tiny-s1l8' in leaf])
def test_imagenet_schedule(leaf, load):
    cfg = load(leaf)
    assert cfg.train_cfg.max_epochs == 300 and cfg.train_cfg.by_epoch
    n = 7
    found = learning_rates(cfg, n, 300 * n)

    def cosine(step):
        return 1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * step / (280 * n)))

    assert found[0] == pytest.approx(1e-6)
    # linear in the iteration, and all of 1e-3 at the last iteration of the warm-up
    assert found[1] == pytest.approx(1e-6 + (1e-3 - 1e-6) / (20 * n - 1))
    assert found[10 * n] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 10 * n / (20 * n - 1))
    assert found[20 * n - 1] == pytest.approx(1e-3)
    for i in (20 * n, 20 * n + 1, 160 * n, 160 * n + 3, 299 * n, 300 * n - 1):
        assert found[i] == pytest.approx(cosine(i - 20 * n)), i
    assert found[160 * n] == pytest.approx(5.05e-4)


def test_imagenet_schedule_scales_with_the_batch(load):
    """The published warm-up start and minimum scale with the batch, as the rate does."""
    cfg = load(IMAGENET[0])
    cfg.optim_wrapper.optimizer.lr = 5e-4
    found = learning_rates(cfg, 2, 600)
    assert found[0] == pytest.approx(5e-7)
    assert found[-1] == pytest.approx(5e-6, rel=1e-2)


@pytest.mark.parametrize('leaf, epochs', [(COCO_1X, 12), (COCO_BS8, 12), (COCO_3X, 36)])
def test_coco_schedule(leaf, epochs, load):
    cfg = load(leaf)
    assert cfg.train_cfg.max_epochs == epochs
    n = 200
    found = learning_rates(cfg, n, epochs * n)
    first, second = (8, 11) if epochs == 12 else (27, 33)
    for i in (0, 1, 500, 999):
        assert found[i] == pytest.approx(1e-4 * (1e-3 + (1 - 1e-3) * i / 999)), i
    assert found[1000] == found[first * n - 1] == pytest.approx(1e-4)
    assert found[first * n] == found[second * n - 1] == pytest.approx(1e-5)
    assert found[second * n] == found[-1] == pytest.approx(1e-6)


def test_ade20k_schedule(load):
    cfg = load(ADE20K[0])
    assert cfg.train_cfg.max_iters == 160_000 and cfg.train_cfg.val_interval == 16_000
    found = learning_rates(cfg, 1, 160_000)
    for i in (0, 1, 700, 1499):
        assert found[i] == pytest.approx(6e-5 * (1e-6 + (1 - 1e-6) * i / 1499)), i
    for i in (1500, 80_000, 159_000):
        assert found[i] == pytest.approx(6e-5 * (1 - (i - 1500) / 158_499)), i
    assert found[-1] == pytest.approx(0., abs=1e-12)


# -- run settings --------------------------------------------------------------------------

@pytest.mark.parametrize('leaf', IMAGENET)
def test_imagenet_run(leaf, load):
    from mmengine.registry import HOOKS
    cfg = load(leaf)
    if 'vanilla-tiny' in leaf:
        assert cfg.custom_hooks == []
    else:
        ema, = (HOOKS.build(hook) for hook in cfg.custom_hooks)
        assert ema.ema_cfg['type'] == 'ExponentialMovingAverage'
        assert ema.ema_cfg['momentum'] == 1e-4
        assert ema.ema_cfg.get('interval', 1) == 1 and ema.begin_iter == ema.begin_epoch == 0
    assert cfg.train_dataloader.batch_size == cfg.val_dataloader.batch_size == 128
    assert cfg.train_dataloader.drop_last
    assert cfg.auto_scale_lr.base_batch_size == 8 * 128
    assert cfg.env_cfg.cudnn_benchmark
    assert cfg.val_cfg.fp16 and cfg.test_cfg.fp16
    checkpoint = HOOKS.build(cfg.default_hooks.checkpoint)
    assert checkpoint.interval == 1 and checkpoint.by_epoch and checkpoint.max_keep_ckpts > 0
    assert cfg.model.train_cfg.augments == [
        dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    assert cfg.model.head.loss == dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')


@pytest.mark.parametrize('leaf', COCO + ADE20K)
def test_dense_run(leaf, load):
    cfg = load(leaf)
    per_gpu = 1 if leaf == COCO_BS8 else 2
    assert cfg.train_dataloader.batch_size == per_gpu
    assert cfg.env_cfg.cudnn_benchmark == (leaf in ADE20K)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts > 0
    if leaf in COCO:
        assert cfg.auto_scale_lr.base_batch_size == 8 * per_gpu
        assert cfg.val_evaluator.metric == ['bbox', 'segm']
    else:
        assert cfg.model.test_cfg.mode == 'whole'


# -- pipelines -----------------------------------------------------------------------------

@pytest.fixture
def photo(tmp_path):
    """A file pair: a small photograph-like image, and a label map."""
    import cv2
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (400, 300))
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    labels = np.kron(rng.integers(0, 151, (3, 4)), np.ones((100, 100))).astype(np.uint8)
    cv2.imwrite(str(tmp_path / 'labels.png'), labels)
    return tmp_path


def compose(pipeline):
    from mmengine.registry import TRANSFORMS
    built = [TRANSFORMS.build(t) for t in pipeline]

    def apply(data):
        for transform in built:
            data = transform(data)
        return data

    return apply


def test_imagenet_pipelines_run(load, photo):
    cfg = load(IMAGENET[0])
    data = dict(img_path=str(photo / 'image.png'), gt_label=1)
    for dataloader in (cfg.train_dataloader, cfg.val_dataloader):
        packed = compose(dataloader.dataset.pipeline)(dict(data))
        assert tuple(packed['inputs'].shape) == (3, 224, 224)

    crop, aug, erase = (
        next(t for t in cfg.train_dataloader.dataset.pipeline if t.type == name)
        for name in ('RandomResizedCrop', 'RandAugment', 'RandomErasing'))
    assert (crop.scale, crop.backend, crop.interpolation) == (224, 'pillow', 'bicubic')
    assert aug.policies == 'timm_increasing' and aug.num_policies == 2
    assert (aug.magnitude_level, aug.magnitude_std, aug.total_level) == (9, 0.5, 10)
    assert (erase.erase_prob, erase.mode) == (0.25, 'rand')
    resize = cfg.val_dataloader.dataset.pipeline[1]
    assert (resize.scale, resize.edge, resize.interpolation) == (256, 'short', 'bicubic')


@pytest.mark.parametrize('leaf', [COCO_1X, COCO_3X])
def test_coco_pipelines_run(leaf, load, photo):
    cfg = load(leaf)
    box = dict(bbox=[40, 40, 240, 200], bbox_label=3, ignore_flag=0,
               mask=[[40, 40, 240, 40, 240, 200, 40, 200]])
    data = dict(img_path=str(photo / 'image.png'), img_id=0, height=300, width=400,
                instances=[box])
    np.random.seed(0)
    packed = compose(cfg.train_dataloader.dataset.pipeline)(dict(data))
    assert min(packed['inputs'].shape[1:]) >= 480
    assert len(packed['data_samples'].gt_instances) == 1
    packed = compose(cfg.test_dataloader.dataset.pipeline)(dict(data))
    assert tuple(packed['inputs'].shape) == (3, 800, 1067)


def test_ade20k_pipelines_run(load, photo):
    cfg = load(ADE20K[0])
    data = dict(img_path=str(photo / 'image.png'), seg_map_path=str(photo / 'labels.png'),
                reduce_zero_label=True, label_map=None, seg_fields=[])
    packed = compose(cfg.train_dataloader.dataset.pipeline)(dict(data, seg_fields=[]))
    assert max(packed['inputs'].shape[1:]) <= 512
    packed = compose(cfg.test_dataloader.dataset.pipeline)(dict(data, seg_fields=[]))
    assert tuple(packed['inputs'].shape) == (3, 512, 683)

    views = compose(cfg.tta_pipeline)(dict(data, seg_fields=[]))
    assert len(views['inputs']) == 6 * 2
    heights = sorted({x.shape[1] for x in views['inputs']})
    assert heights == [150, 225, 300, 375, 450, 525]  # 0.5 to 1.75 times the image itself
    assert cfg.tta_model.type == 'SegTTAModel'
