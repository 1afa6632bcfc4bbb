"""The zoo: metafiles, their table in configs/README.md, and mmpretrain's hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / 'configs'
RELEASES = 'https://github.com/MzeroMiko/VMamba/releases/download/'
DP05 = 'vmamba-vanilla-base-dp05_8xb128_in1k-224'

# What the authors published, typed from their tables; the last value is tag/file of the release.
# PUBLISHED spells the names out.
TOP1 = {
    'vanilla-tiny': (82.2, 'v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'),
    'vanilla-small': (83.5, 'v0cls/vssmsmall_dp03_ckpt_epoch_238.pth'),
    'vanilla-base': (83.7, 'v0cls/vssmbase_dp06_ckpt_epoch_241.pth'),
    'vanilla-base-dp05': (83.2, '20240218/vssmbase_dp05_ckpt_epoch_260.pth'),
    'tiny-s2l5': (82.5, 'v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'),
    'small-s2l15': (83.6, 'v2cls/vssm_small_0229_ckpt_epoch_222.pth'),
    'base-s2l15': (83.9, 'v2cls/vssm_base_0229_ckpt_epoch_237.pth'),
    'tiny-s1l8': (82.6, 'v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
    'small-s1l20': (83.3, 'v2cls/vssm1_small_0229s_ckpt_epoch_240.pth'),
    'base-s1l20': (83.8, 'v2cls/vssm1_base_0229s_ckpt_epoch_225.pth'),
}
V0DET, V2DET = 'mask_rcnn_swin_fpn_coco', 'v2det/mask_rcnn_vssm_fpn_coco'
AP = {  # box AP, AP50, AP75, mask AP, AP50, AP75
    'vanilla-tiny_fpn_1x':
        (46.5, 68.5, 50.7, 42.1, 65.5, 45.3, f'v0det/vssmtiny_{V0DET}_epoch_12.pth'),
    'vanilla-small_fpn_1x':
        (48.2, 69.7, 52.5, 43.0, 66.6, 46.4, f'v0det/vssmsmall_{V0DET}_epoch_12.pth'),
    'vanilla-base_fpn_1x':
        (48.6, 70.0, 53.1, 43.3, 67.1, 46.7, f'v0det/vssmbase_{V0DET}_epoch_12.pth'),
    'vanilla-tiny_fpn_ms-3x':
        (48.5, 70.0, 52.7, 43.2, 66.9, 46.4, f'v0det/vssmtiny_{V0DET}_ms_3x_epoch_34.pth'),
    'vanilla-small_fpn_ms-3x':
        (49.7, 70.4, 54.2, 44.0, 67.6, 47.3, f'v0det/vssmsmall_{V0DET}_ms_3x_epoch_34.pth'),
    'tiny-s2l5_fpn_1x': (47.4, 69.5, 52.0, 42.7, 66.3, 46.0, f'{V2DET}_tiny_epoch_12.pth'),
    'small-s2l15_fpn_1x': (48.7, 70.0, 53.4, 43.7, 67.3, 47.0, f'{V2DET}_small_epoch_11.pth'),
    'base-s2l15_fpn_1x': (49.2, 71.4, 54.0, 44.1, 68.3, 47.7, f'{V2DET}_base_epoch_11.pth'),
    'base-s2l15_fpn_8xb1-1x':
        (49.2, 70.9, 53.9, 43.9, 67.7, 47.6, f'{V2DET}_base_epoch_12_bs8.pth'),
    'tiny-s1l8_fpn_1x': (47.3, 69.3, 52.0, 42.7, 66.4, 45.9, f'{V2DET}_tiny_s_epoch_12.pth'),
    'tiny-s2l5_fpn_ms-3x':
        (48.9, 70.6, 53.6, 43.7, 67.7, 46.8, f'{V2DET}_tiny_ms_3x_epoch_36.pth'),
    'small-s2l15_fpn_ms-3x':
        (49.9, 70.9, 54.7, 44.2, 68.2, 47.7, f'{V2DET}_small_ms_3x_epoch_32.pth'),
    'tiny-s1l8_fpn_ms-3x':
        (48.8, 70.4, 53.5, 43.7, 67.4, 47.0, f'{V2DET}_tiny_ms_3x_s_epoch_31.pth'),
}
V0SEG = 'upernet_4xb4-160k_ade20k-512x512_iter'
V2SEG = 'v2seg/upernet_vssm_4xb4-160k_ade20k-512x512'
MIOU = {  # single scale, multi-scale + flip
    'vanilla-tiny': (47.3, 48.3, f'v0seg/vssmtiny_{V0SEG}_160000.pth'),
    'vanilla-small': (49.5, 50.5, f'v0seg/vssmsmall_{V0SEG}_160000.pth'),
    'vanilla-base': (50.0, 51.3, f'v0seg/vssmbase_{V0SEG}_128000.pth'),
    'tiny-s2l5': (48.3, 48.6, f'{V2SEG}_tiny_iter_160000.pth'),
    'small-s2l15': (50.6, 51.2, f'{V2SEG}_small_iter_144000.pth'),
    'base-s2l15': (51.0, 51.6, f'{V2SEG}_base_iter_160000.pth'),
    'tiny-s1l8': (47.9, 48.8, f'{V2SEG}_tiny_s_iter_160000.pth'),
}
PUBLISHED = {
    **{f'vmamba-{k}_8xb128_in1k-224': row for k, row in TOP1.items()},
    **{f'mask-rcnn_vmamba-{k}_coco': row for k, row in AP.items()},
    **{f'upernet_vmamba-{k}_8xb2-160k_ade20k-512x512': row for k, row in MIOU.items()},
}
METRICS = {
    'Image Classification': ['Top 1 Accuracy'],
    'Object Detection': ['box AP', 'box AP50', 'box AP75'],
    'Instance Segmentation': ['mask AP', 'mask AP50', 'mask AP75'],
    'Semantic Segmentation': ['mIoU', 'mIoU(ms+flip)'],
}


def read_index(path):
    """{name: row} of a metafile or an index, read as mmpretrain reads it."""
    load = pytest.importorskip('modelindex.load_model_index').load
    index = load(str(path))
    index.build_models_with_collections()
    assert not index.check_errors
    for row in index.models:
        assert not row.check_errors, row.name
    names = [row.name for row in index.models]
    assert len(names) == len(set(names))
    return {row.name: row for row in index.models}


@pytest.fixture(scope='module')
def zoo():
    return read_index(REPO / 'model-index.yml')


@pytest.fixture(scope='module')
def config_of(zoo, read_config):
    return {name: read_config(row.config) for name, row in zoo.items()}


def numbers(row):
    return [value for result in row.results for value in result.metrics.values()]


def arch_of_file(name):
    """The arch that a released file's name tells: 'vssm1'/'_s' is s1, 'vssm' alone is s2."""
    size = re.search('tiny|small|base', name)[0]
    if re.match('v0|2024', name):
        return f'vanilla_{size}'
    s1 = 'vssm1_' in name or re.search(r'_s_(epoch|iter)', name)
    if size == 'tiny':
        return 'tiny_s1l8' if s1 else 'tiny_s2l5'
    return f'{size}_s1l20' if s1 else f'{size}_s2l15'


# -- rows ----------------------------------------------------------------------------------

def test_every_config_has_its_row_and_every_row_its_config(zoo):
    configs = {p.relative_to(REPO).as_posix() for p in CONFIGS.rglob('*.py')
               if not {'_base_', 'demo', 'ablations'} & set(p.parts)
               and '-fast_' not in p.name}  # a published recipe on another pipeline
    assert {row.config for row in zoo.values()} == configs
    # The name of a row is that of its config, but for the second file of vanilla B.
    assert {name for name, row in zoo.items() if Path(row.config).stem != name} == {DP05}
    assert zoo[DP05].config == 'configs/vmamba/vmamba-vanilla-base_8xb128_in1k-224.py'


def test_every_published_file_is_a_row(zoo):
    assert {name: row.weights for name, row in zoo.items()} == {
        name: f'{RELEASES}%23{row[-1]}' for name, row in PUBLISHED.items()}


def kind_of(row):
    return re.match('[a-z]+', Path(row.config).name)[0]


def test_addresses(zoo):
    addresses = [row.weights for row in zoo.values()]
    assert len(set(addresses)) == len(addresses) == 10 + 13 + 7
    for name, row in zoo.items():
        tag, file = row.weights.removeprefix(RELEASES).split('/')
        task = {'vmamba': 'cls', 'mask': 'det', 'upernet': 'seg'}[kind_of(row)]
        generation = 'v0' if 'vanilla' in name else 'v2'
        assert tag == ('%2320240218' if name == DP05 else f'%23{generation}{task}')
        assert re.fullmatch(r'[\w-]+\.pth', file)  # no raw '#', which would cut the address off


@pytest.mark.parametrize('name', PUBLISHED)
def test_metrics(name, zoo):
    row = zoo[name]
    assert numbers(row) == list(PUBLISHED[name][:-1])
    tasks = {'vmamba': ['Image Classification'],
             'mask': ['Object Detection', 'Instance Segmentation'],
             'upernet': ['Semantic Segmentation']}[kind_of(row)]
    assert [result.task for result in row.results] == tasks
    for result in row.results:
        assert list(result.metrics) == METRICS[result.task]


def test_numbers_are_labelled_as_the_authors(zoo):
    for row in zoo.values():
        label = row.full_model.metadata.data['Source of Results']
        assert label == 'published by the authors of the paper, not measured here'
        assert row.full_model.data['Paper']['URL'] == 'https://arxiv.org/abs/2401.10166'


def test_arch_of_the_config_is_that_of_the_file(zoo, config_of):
    """One of the published links is wrong here: ADE20K's T[s2l5] leads to the config of s1l8."""
    for name, row in zoo.items():
        file = row.weights.removeprefix(f'{RELEASES}%23')
        assert config_of[name].model.backbone.arch == arch_of_file(file), name
    assert config_of['upernet_vmamba-tiny-s2l5_8xb2-160k_ade20k-512x512'].model.backbone.arch == \
        'tiny_s2l5'


def test_drop_path_is_that_of_the_file(zoo, config_of):
    """dp01 and dp06 in the file's name are right; the released recipes say 0.2 and 0.5."""
    checked = set()
    for name, row in zoo.items():
        found = re.search(r'_dp(\d)(\d)_', row.weights)
        if found and name != DP05:  # which shares the config of the newer file
            expected = float(f'{found[1]}.{found[2]}')
            assert config_of[name].model.backbone.drop_path_rate == expected, name
            checked.add(expected)
    assert checked == {0.1, 0.3, 0.6}


def test_dense_models_start_from_a_file_of_the_zoo(zoo, config_of):
    start_of = {row.weights: name for name, row in zoo.items() if 'in1k' in name}
    for name, cfg in config_of.items():
        if 'in1k' in name:
            continue
        start = start_of[cfg.model.backbone.init_cfg.checkpoint]
        assert config_of[start].model.backbone.arch == cfg.model.backbone.arch
        # vanilla B started from the older file, not from the listed one
        assert (start == DP05) == ('vanilla-base' in name)


def test_batch_size_is_that_of_the_config(zoo, config_of):
    """The row 'bs8' trained with half the batch; its file is not that of the regular row."""
    for name, row in zoo.items():
        if 'auto_scale_lr' in config_of[name]:
            assert row.full_model.metadata.batch_size == \
                config_of[name].auto_scale_lr.base_batch_size, name
    bs8, = (name for name, row in zoo.items() if 'bs8' in row.weights)
    assert bs8 == 'mask-rcnn_vmamba-base-s2l15_fpn_8xb1-1x_coco'
    assert zoo[bs8].full_model.metadata.batch_size == 8


def test_parameters_of_the_classifiers(zoo, config_of):
    import torch
    from mmengine.registry import MODELS, init_default_scope
    init_default_scope('mmpretrain')
    for name, row in zoo.items():
        if 'in1k' in name:
            with torch.device('meta'):
                model = MODELS.build(config_of[name].model)
            assert row.metadata.parameters == sum(p.numel() for p in model.parameters()), name


# -- table ---------------------------------------------------------------------------------

def table(rows):
    """The rows of one task as they stand in configs/README.md."""
    metrics = [metric for result in rows[0].results for metric in result.metrics]
    lines = ['| Config | ' + ' | '.join(metrics) + ' | Parameters | FLOPs | Weights |',
             '|---|' + '---|' * (len(metrics) + 3)]
    for row in rows:
        data = row.metadata
        cells = [f'[{row.name}]({Path(row.config).relative_to("configs/vmamba")})',
                 *map(str, numbers(row)), f'{data.parameters / 1e6:.0f} M',
                 f'{data.flops / 1e9:g} G', f'[{row.weights.rpartition("/")[2]}]({row.weights})']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize(('task', 'kind'), [('imagenet', 'vmamba'), ('coco', 'mask'),
                                            ('ade20k', 'upernet')])
def test_readme_shows_the_metafile(task, kind):
    rows = read_index(CONFIGS / 'vmamba' / 'metafile.yml').values()
    expected = table([row for row in rows if kind_of(row) == kind])
    readme = (CONFIGS / 'vmamba/README.md').read_text()
    shown = re.search(rf'^### {task}\n[^#|]*((?:\|.*\n)+)', readme, re.MULTILINE)
    assert shown and shown[1] == expected, f'configs/README.md should have:\n{expected}'


# -- mmpretrain's hub ----------------------------------------------------------------------

def run(code, cwd):
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_hub_lists_the_classifiers_and_nothing_else_of_ours(tmp_path):
    """In a fresh process, outside the checkout; a second registration changes nothing."""
    pytest.importorskip('mmpretrain')
    out = run('import importlib, json, sys\n'
              'import vmamba_mm\n'
              'assert not {"mmpretrain", "torch"} & set(sys.modules)\n'
              'import vmamba_mm.mmpretrain\n'
              'importlib.reload(vmamba_mm.mmpretrain)\n'
              'import mmpretrain\n'
              'assert len(mmpretrain.list_models("resnet50_8xb32_in1k")) == 1\n'
              'print(json.dumps(mmpretrain.list_models("*vmamba*")))', tmp_path)
    assert set(json.loads(out)) == {f'vmamba-{k}_8xb128_in1k-224' for k in TOP1}


NAME = 'vmamba-tiny-s1l8_8xb128_in1k-224'


def test_hub_builds_and_loads(tmp_path, mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    import torch

    import vmamba_mm.mmpretrain  # noqa: F401
    model = mmpretrain.get_model(NAME, head=dict(num_classes=10))
    file = tmp_path / 'ours.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), file)
    again = mmpretrain.get_model(NAME, pretrained=str(file), head=dict(num_classes=10))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again._metainfo.weights == f'{RELEASES}%23{TOP1["tiny-s1l8"][1]}'


def test_hub_loads_an_official_file(mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    import torch

    import vmamba_mm.mmpretrain  # noqa: F401
    from vmamba_mm.checkpoints.files import read_checkpoint
    parity = REPO.parent / 'shared/parity'
    file = parity / 's1.cls.pth'
    if not file.is_file():
        pytest.skip('no ../shared/parity/s1.cls.pth beside the checkout')
    arch = read_checkpoint(file)['meta']['arch']
    model = mmpretrain.get_model(
        NAME, pretrained=str(file), backbone=dict(arch=dict(_delete_=True, **arch)),
        head=dict(num_classes=10, in_channels=8 * arch['embed_dims']))
    case = torch.load(parity / 's1.expected.pt', weights_only=True)['cases'][0]
    with torch.no_grad():
        torch.testing.assert_close(model(case['input']), case['logits'], rtol=1e-4, atol=1e-4)


# -- the installed package -----------------------------------------------------------------

@pytest.mark.parametrize('name', ['vmamba/vmamba-tiny-s1l8_8xb128_in1k-224',
                                  'vmamba/mask-rcnn_vmamba-base-s2l15_fpn_8xb1-1x_coco',
                                  'vmamba/upernet_vmamba-vanilla-tiny_8xb2-160k_ade20k-512x512'])
def test_base_by_package_name(name, tmp_path, read_config):
    """`_base_ = 'vmamba_mm::...'`: mmengine gives every type in it the scope vmamba_mm."""
    import torch
    from mmengine.registry import MODELS
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'vmamba_mm::{name}.py'\n")
    cfg = read_config(path)
    with torch.device('meta'):
        assert MODELS.build(cfg.model).backbone.arch
    # mmengine would pass the scope on to a collate_fn, which does not take it.
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert 'collate_fn' not in loader
