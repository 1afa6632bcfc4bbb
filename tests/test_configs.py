"""Every leaf config of every family: it has its row of the zoo, it builds, nothing is left over."""

import re

import pytest
import specs  # noqa: F401 (registers the model of the made-up family)
from leaves import ENTRIES, LEAVES, REPO, VARIANTS, entry_of

from vmamba_mm import zoo
from vmamba_mm.mm.cli import datasets_of
from vmamba_mm.models.pretrained import StrictLoading
from vmamba_mm.models.restorer import Restorer

#: The scope lets the tests of one leaf follow one another, so that its model is built once.
each_leaf = pytest.mark.parametrize('leaf', LEAVES, scope='module')
PREPROCESSORS = dict(cls='ClsDataPreprocessor', video='vmamba_mm.ClipPreprocessor',
                     det='DetDataPreprocessor', seg='SegDataPreProcessor',
                     diffusion='mmpretrain.ClsDataPreprocessor',
                     points='vmamba_mm.PointPreprocessor',
                     **dict.fromkeys(zoo.RESTORATION, 'vmamba_mm.PairPreprocessor'))

#: Mean pixels where the authors have those of the data set.
MEANS = {'UC Merced': [123.77, 125.41, 115.36], 'AID': [101.03, 104.0, 93.5],
         'RESISC45': [93.85, 97.2, 87.67], 'ISIC 2017': [0.0] * 3, 'ISIC 2018': [0.0] * 3,
         'Synapse': [0.0] * 3, 'ImageNet 256x256': [127.5] * 3, 'ImageNet 512x512': [127.5] * 3,
         'CIFAR-10': [127.5] * 3, 'CelebA 64x64': [127.5] * 3}


def test_every_leaf_has_its_row_and_every_row_its_leaf():
    rows = {entry.path.relative_to(REPO).as_posix() for entry in ENTRIES}
    assert rows | set(VARIANTS) == set(LEAVES) and set(VARIANTS.values()) <= rows


def arch_name(cfg):
    """The published architecture that the backbone's is, or differs from in some keys."""
    arch = cfg.model.backbone.arch
    return arch if isinstance(arch, str) else arch.base


@each_leaf
def test_model_is_that_of_its_row(leaf, load, build_meta):
    """Parameters of classifiers exactly, of others as the authors print them."""
    cfg, entry, model = load(leaf), entry_of(leaf), build_meta(leaf)
    assert isinstance(model.backbone, StrictLoading) and arch_name(cfg) == entry.arch
    assert model.backbone.family.name == entry.family
    beside = 'distill_head.'  # of training alone
    found = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(beside))
    assert found == entry.parameters or round(found / 1e6) * 10**6 == entry.parameters


@each_leaf
def test_nothing_is_left_of_the_stock_config(leaf, load):
    cfg, entry = load(leaf), entry_of(leaf)
    assert cfg.custom_imports == dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
    assert set(cfg.model.backbone) <= {'type', 'arch', 'drop_path_rate', 'out_indices', 'out_type',
                                       'features', 'in_channels', 'init_cfg', 'num_images',
                                       'drop_rate', 'projection', 'with_last_map', 'with_states'}
    assert not re.findall(r'https?:[^\s\'"]+', str(cfg.to_dict()))
    if entry.pretrained is None:
        assert 'init_cfg' not in cfg.model.backbone  # trained from scratch
    else:
        init_cfg = cfg.model.backbone.init_cfg
        assert zoo.find(init_cfg.checkpoint.removeprefix(zoo.SCHEME)) == zoo.find(entry.pretrained)
        assert (init_cfg.type, init_cfg.prefix) == ('Pretrained', 'backbone.')


@each_leaf
def test_necks_and_heads_take_what_the_backbone_gives(leaf, load, build_meta):
    if entry_of(leaf).task == 'diffusion':  # there are none
        assert not {'neck', 'head', 'decode_head'} & set(load(leaf).model)
        return
    model, cfg = build_meta(leaf), load(leaf).model
    if isinstance(model.backbone, Restorer):  # a whole network
        return
    channels = model.backbone.out_channels
    found = {name: part.in_channels for name, part in cfg.items()
             if name in ('neck', 'head', 'decode_head', 'auxiliary_head') and part
             and 'in_channels' in part}
    # A decode head takes what the neck gives; one without out_channels keeps each map's.
    if 'neck' in found and 'decode_head' in found and 'out_channels' in cfg.neck:
        width = found.pop('decode_head')
        assert width == [cfg.neck.out_channels] * len(width)
    for name, width in found.items():
        one = channels[-2] if name == 'auxiliary_head' else channels[-1]
        assert width in (channels, one), name
    assert found or entry_of(leaf).task == 'pretrain'  # which has neither


@each_leaf
def test_batch_size_is_that_of_the_row(leaf, load):
    cfg, entry = load(leaf), entry_of(leaf)
    if 'auto_scale_lr' in cfg:
        assert entry.metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size


@each_leaf
def test_every_transform_and_evaluator_builds(leaf, load):
    from mmengine.registry import METRICS, MODELS, TRANSFORMS
    cfg, task = load(leaf), entry_of(leaf).task
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for _, dataset in datasets_of(loader.dataset, ''):
            for transform in dataset.pipeline:
                TRANSFORMS.build(transform)
    for transform in cfg.get('tta_pipeline', []):
        TRANSFORMS.build(transform)
    if task != 'det':  # COCO's evaluator opens the annotations
        METRICS.build(cfg.val_evaluator)
        METRICS.build(cfg.test_evaluator)
    preprocessor = cfg.get('data_preprocessor') or cfg.model.get('data_preprocessor', {})
    built = MODELS.build({'type': PREPROCESSORS.get(task), **preprocessor})
    if not hasattr(built, 'mean'):  # volumes and clouds are normalised alone, pairs in the network
        assert type(built).__name__ in ('VolumePreprocessor', 'PointPreprocessor',
                                        'PairPreprocessor')
        return
    own = MEANS.get(entry_of(leaf).dataset)
    means = [round(x, 2) for x in built.mean.flatten().tolist()]
    # Of the data set, of ImageNet, or of what starts from CLIP; of each image of several.
    assert means[:3] in ([own] if own else [[123.68, 116.28, 103.53], [122.77, 116.75, 104.09]])
    assert means == means[:3] * cfg.model.backbone.get('num_images', 1)


@pytest.mark.parametrize('task', PREPROCESSORS)
def test_base_by_package_name(task, tmp_path, read_config):
    """`_base_ = 'vmamba_mm::...'`: mmengine gives every type in it the scope vmamba_mm."""
    import torch
    from mmengine.registry import MODELS

    from vmamba_mm.mm.cli.runs import model_settings

    entry = zoo.entries(task=task)[-1]
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'vmamba_mm::{entry.config.removeprefix('configs/')}'\n")
    cfg = read_config(path)
    with torch.device('meta'):
        assert MODELS.build(model_settings(cfg)).backbone.arch
    # mmengine would pass the scope on to a collate_fn, which does not take it.
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert 'collate_fn' not in loader
