"""The zoo: metafiles, names, and mmpretrain's hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from official import shared

from vmamba_mm import zoo
from vmamba_mm.checkpoints.files import fetch, read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.paths import CONFIGS

REPO = Path(__file__).resolve().parents[1]
VMAMBA = zoo.entries('vmamba')
DP05 = 'vmamba-vanilla-base-dp05_8xb128_in1k-224'
METRICS = {
    'Image Classification': {'Top 1 Accuracy', 'Top 5 Accuracy', 'Precision', 'Recall', 'F1'},
    'Action Recognition': {'Top 1 Accuracy', 'Top 5 Accuracy'},
    'Object Detection': {'box AP', 'box AP50', 'box AP75'},
    'Instance Segmentation': {'mask AP', 'mask AP50', 'mask AP75'},
    'Semantic Segmentation': {'mIoU', 'mIoU(ms+flip)', 'IoU', 'DSC', 'Accuracy', 'Specificity',
                              'Sensitivity', 'HD95',
                              *(f'{region} {metric}' for region in ('WT', 'TC', 'ET')
                                for metric in ('Dice', 'HD95'))},
    'Change Detection': set(),
    'Masked Pre-training': set(),
    'Multi-Instance Retrieval': {'mAP', 'nDCG'},
    'Text-to-Video Retrieval': {'R@1', 'R@5', 'R@10'},
    'Language Modelling': set(),
    'Medical Segmentation': set(),
    'Point Cloud Classification': {'Overall Accuracy'},
    'Part Segmentation': {'Instance mIoU'},
    'Super-Resolution': {'PSNR', 'SSIM', 'PSNR+'},
    'Image Denoising': {'PSNR', 'SSIM'},
    'JPEG Artefact Removal': {'PSNR', 'SSIM'},
    'Image Generation': {'FID-50K'},
}


NO_RESULTS = 'none; no weights were released'


# -- the metafiles -------------------------------------------------------------------------------

#: Of these a recipe was published, and nothing else.
RECIPES_ALONE = 'mambairv2-noise25_8xb2-800k_dfwb', 'mambairv2-noise50_8xb2-800k_dfwb'


def has_no_results(entry):
    """Whether the paper's numbers are not taken over."""
    return entry.family in ('rs_mamba', 'u_mamba')


def test_the_index_as_openmmlab_reads_it():
    load = pytest.importorskip('modelindex.load_model_index').load
    index = load(str(REPO / 'model-index.yml'))
    index.build_models_with_collections()
    assert not index.check_errors
    for row in index.models:
        assert not row.check_errors, row.name
    entries = {entry.name: entry for entry in zoo.entries()}
    assert [row.name for row in index.models] == list(entries)
    for row in index.models:
        entry, data = entries[row.name], row.full_model.metadata.data
        assert (row.config, row.weights) == (entry.config, entry.weights)
        assert row.metadata.parameters == entry.parameters and row.metadata.flops == entry.flops
        assert [r.metrics for r in row.results] == [r.metrics for r in entry.results]
        assert data['Source of Results'] == (NO_RESULTS if has_no_results(entry) else
                                             'published by the authors of the paper, not measured '
                                             'here')
        assert row.full_model.data['Paper']['URL'].startswith('https://arxiv.org/abs/')


@pytest.mark.parametrize('entry', zoo.entries(), ids=lambda entry: entry.name)
def test_row(entry):
    # There is no recipe of language models, of some pre-trainings, and of what nnU-Net trains.
    assert (entry.config is None) == (entry.path is None)
    assert entry.config or entry.task in ('lm', 'pretrain', 'medical')
    if entry.config:
        assert entry.path.samefile(REPO / entry.config)
        # The name is that of the config, but for a second file of one config, and a pre-training.
        assert entry.path.stem == entry.name or entry.task == 'pretrain' or \
            entry is not zoo.entries(entry.family, entry.arch, entry.task)[0]
    assert entry.weights is None or re.fullmatch(r'https://[^#\s]+/[\w.-]+', entry.weights)
    assert entry.sha256 is None or re.fullmatch('[0-9a-f]{64}', entry.sha256)
    for result in entry.results:
        assert set(result.metrics) <= METRICS[result.task]
        assert all(0 < value < 100 for value in result.metrics.values())
    is_dense = entry.task in ('det', 'seg', 'medical', 'diffusion', *zoo.RESTORATION)
    assert (entry.tag is None) == is_dense
    assert bool(entry.metrics) != (has_no_results(entry) or entry.name in RECIPES_ALONE) \
        or entry.task in ('pretrain', 'lm', 'diffusion')
    if entry.pretrained is not None:
        start = zoo.find(entry.pretrained)
        assert entry.pretrained == f'{start.family}/{start.arch}.{start.tag}'
        assert not is_dense or start.task == 'cls' and (
            start.arch == entry.arch or start.family != entry.family)
    # What is no row here has its address.
    outside = entry.metadata.get('Started From')
    is_from_random = not is_dense or has_no_results(entry) \
        or entry.family in ('seg_mamba', 'dis') or entry.task in zoo.RESTORATION
    assert (entry.pretrained is not None) != bool(outside) or is_from_random and not outside


def test_every_row_has_its_own_weights():
    addresses = [entry.weights for entry in zoo.entries() if entry.weights is not None]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize('less, more', [
    ('box AP', 'box AP50'), ('box AP', 'box AP75'), ('box AP75', 'box AP50'),
    ('mask AP', 'mask AP50'), ('mask AP75', 'mask AP50'), ('mask AP', 'box AP'),
    ('mIoU', 'mIoU(ms+flip)'), ('Set5 PSNR', 'Set5 PSNR+'), ('Set5 SSIM', 'Set5 PSNR')])
def test_metrics_are_in_order(less, more):
    pairs = [(e.metrics[less], e.metrics[more]) for e in zoo.entries()
             if less in e.metrics and more in e.metrics]
    assert pairs and all(a < b for a, b in pairs)


# -- VMamba's, whose files' names say what they hold -----------------------------------------------

def arch_of_file(name):
    """The arch that a released file's name tells: 'vssm1'/'_s' is s1, 'vssm' alone is s2."""
    size = re.search('tiny|small|base', name)[0]
    if re.match('v0|2024', name):
        return f'vanilla_{size}'
    s1 = 'vssm1_' in name or re.search(r'_s_(epoch|iter)', name)
    if size == 'tiny':
        return 'tiny_s1l8' if s1 else 'tiny_s2l5'
    return f'{size}_s1l20' if s1 else f'{size}_s2l15'


def file_of(entry):
    """Release tag and file, without the '#' that tags begin with."""
    return '/'.join(entry.weights.split('/')[-2:]).removeprefix('%23')


@pytest.mark.parametrize('entry', VMAMBA, ids=lambda entry: entry.name)
def test_arch_is_that_of_the_file(entry):
    """One of the published links is wrong here: ADE20K's T[s2l5] leads to the config of s1l8."""
    assert entry.arch == arch_of_file(file_of(entry))
    release = '20240218' if entry.name == DP05 else \
        f'{"v0" if "vanilla" in entry.arch else "v2"}{entry.task}'
    assert file_of(entry).startswith(f'{release}/')


def test_drop_path_is_that_of_the_file(read_config):
    """dp01 and dp06 in the file's name are right; the released recipes say 0.2 and 0.5."""
    checked = set()
    for entry in VMAMBA:
        found = re.search(r'_dp(\d)(\d)_', entry.weights)
        if found and entry.name != DP05:  # which shares the config of the newer file
            expected = float(f'{found[1]}.{found[2]}')
            assert read_config(entry.path).model.backbone.drop_path_rate == expected
            checked.add(expected)
    assert checked == {0.1, 0.3, 0.6}


def test_what_is_odd_about_the_release():
    """Vanilla B's dense models started from an older file; 'bs8' trained with half the batch."""
    for entry in VMAMBA:
        if entry.task != 'cls':
            assert (zoo.find(entry.pretrained).name == DP05) == (entry.arch == 'vanilla_base')
    bs8, = (entry for entry in VMAMBA if 'bs8' in entry.weights)
    assert bs8.metadata['Batch Size'] == 8 and '_8xb1-1x_' in bs8.name
    assert {e.arch for e in VMAMBA} - {e.arch for e in VMAMBA if e.task != 'cls'} == {
        'small_s1l20', 'base_s1l20'}


# -- names -------------------------------------------------------------------------------------

def test_names():
    newest, older = zoo.entries('vmamba', 'vanilla_base', 'cls')
    assert zoo.find('vmamba/vanilla_base') is zoo.find('vmamba/vanilla_base.in1k') is newest
    assert zoo.find('vmamba/vanilla_base.dp05_in1k') is older is zoo.find(DP05)
    assert zoo.config_for('vmamba', 'tiny_s1l8', 'det') == \
        'configs/vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py'
    assert zoo.config_for('vmamba', 'base_s1l20', 'seg') is None
    for entry in zoo.entries():
        if entry.weights is not None:
            assert zoo.weights_of(entry.source) == entry.weights


@pytest.mark.parametrize('name', ['vmamba/tiny_s1l9', 'vmamba-tiny-s1l8', 'nothing like it'])
def test_unknown_names(name):
    with pytest.raises(UserError, match=f"the zoo has no '{name}'; names are for example '"):
        read_checkpoint(zoo.SCHEME + name)


def test_checkpoints_by_name(monkeypatch, tmp_path):
    """Of the reader, of a backbone in a plain process and of mmengine once our loader is there."""
    from mmengine.runner.checkpoint import CheckpointLoader

    import vmamba_mm.mm.loading  # noqa: F401
    from vmamba_mm.models import VMamba
    arch = dict(base='tiny_s1l8', embed_dims=8, depths=(1, 1, 1, 1))
    file = tmp_path / 'tiny.pth'
    torch.save(VMamba(arch).state_dict(), file)
    asked = []
    monkeypatch.setattr(zoo, 'weights_of', lambda name: asked.append(name) or str(file))
    monkeypatch.setattr('vmamba_mm.checkpoints.files.weights_of', zoo.weights_of)
    source = 'vmamba_mm://vmamba/tiny_s1l8'
    assert fetch(source) == file
    VMamba(arch, init_cfg=dict(type='Pretrained', checkpoint=source)).init_weights()
    assert CheckpointLoader.load_checkpoint(source, map_location='cpu')['state_dict']
    assert asked == [source] * 3


# -- metafiles of others -----------------------------------------------------------------------

@pytest.fixture
def metafile(tmp_path):
    """A family's folder outside the package, with one classifier."""
    content = yaml.safe_load((CONFIGS / 'vmamba/metafile.yml').read_text())
    content['Models'] = content['Models'][:1]
    content['Models'][0].update(Name='nano', Weights=None, Config='configs/mine/nano.py')
    path = tmp_path / 'configs/mine/metafile.yml'
    path.parent.mkdir(parents=True)

    def write(change=lambda model: None):
        change(content['Models'][0])
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_own_configs_join(metafile, monkeypatch, tmp_path):
    path, before = metafile(), zoo.entries()
    zoo.register_configs(path.parent)
    try:
        entry = zoo.entries()[-1]
        assert zoo.entries()[:-1] == before and (entry.name, entry.family) == ('nano', 'mine')
        assert entry.path == tmp_path / 'configs/mine/nano.py'
        assert zoo.find('mine/vanilla_tiny') == entry
        with pytest.raises(UserError, match='the weights of nano were not published'):
            zoo.weights_of(entry.source)
    finally:
        zoo.unregister_configs(path.parent)
    assert zoo.entries() == before


def test_published_hashes(metafile):
    address, sha256 = 'https://example.org/nano.pth', 64 * 'a'

    def publish(model):
        model['Weights'], model['Metadata']['SHA-256'] = address, sha256

    path = metafile(publish)
    assert zoo.published_sha256(address) is None
    zoo.register_configs(path.parent)
    try:
        assert zoo.published_sha256(address) == sha256
    finally:
        zoo.unregister_configs(path.parent)


@pytest.mark.parametrize('change, match', [
    (lambda m: m['Metadata'].pop('Arch'), r"metafile\.yml: nano lacks 'Arch'"),
    (lambda m: m.update({'In Collection': 'Nano'}), "nano lacks 'Nano', or names what is not"),
    (lambda m: m['Results'][0].update(Task='Telepathy'), "nano lacks 'Telepathy', or names"),
    (lambda m: m['Results'].append(dict(m['Results'][0], Task='Object Detection')),
     r"nano has results of several tasks, \['cls', 'det'\]"),
])
def test_wrong_metafiles(metafile, change, match):
    with pytest.raises(UserError, match=match):
        zoo.read_metafile(metafile(change))


# -- mmpretrain's hub ----------------------------------------------------------------------------

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
              'from vmamba_mm.mm.compat import prepare_mm\n'
              'prepare_mm()\n'
              'import mmpretrain\n'
              'before = set(mmpretrain.list_models())\n'
              'import vmamba_mm.mmpretrain\n'
              'importlib.reload(vmamba_mm.mmpretrain)\n'
              'importlib.reload(vmamba_mm.integrations.mmpretrain)\n'
              'assert "resnet50_8xb32_in1k" in before\n'
              'print(json.dumps(sorted(set(mmpretrain.list_models()) - before)))', tmp_path)
    assert json.loads(out) == sorted(entry.name for entry in zoo.entries(task='cls'))


NAME = 'vmamba-tiny-s1l8_8xb128_in1k-224'


def test_hub_builds_and_loads(tmp_path, mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    import vmamba_mm.mmpretrain  # noqa: F401

    def get_small(**kwargs):
        arch = dict(_delete_=True, base='tiny_s1l8', embed_dims=16)  # mmengine takes the key out
        return mmpretrain.get_model(NAME, backbone=dict(arch=arch),
                                    head=dict(num_classes=10, in_channels=128), **kwargs)

    model = get_small()
    file = tmp_path / 'ours.pth'
    torch.save(dict(meta={}, state_dict=model.state_dict()), file)
    again = get_small(pretrained=str(file))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert again._metainfo.weights == zoo.find(NAME).weights


def test_hub_loads_an_official_file(mm):
    mmpretrain = pytest.importorskip('mmpretrain')
    import vmamba_mm.mmpretrain  # noqa: F401
    file = shared('parity/s1.cls.pth')
    arch = read_checkpoint(file)['meta']['arch']
    model = mmpretrain.get_model(
        NAME, pretrained=str(file), backbone=dict(arch=dict(_delete_=True, **arch)),
        head=dict(num_classes=10, in_channels=8 * arch['embed_dims']))
    case = torch.load(file.with_name('s1.expected.pt'), weights_only=True)['cases'][0]
    with torch.no_grad():
        torch.testing.assert_close(model(case['input']), case['logits'], rtol=1e-4, atol=1e-4)
