"""Volumes: reading them, what is refused and how, windows that slide, Dice and HD95, a run."""

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement
from specs import SPECS

from vmamba_mm.errors import UserError

SMALL = SPECS['seg_mamba'].first
KEYS = ['image', 'label']


def write(path, values, affine=None):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def write_case(root, case='p1', size=(6, 5, 4), label=None, channels=2, **affines):
    rng = np.random.default_rng(0)
    for i in range(channels):
        write(root / case / f'{case}_{i}.nii.gz', rng.normal(size=size).astype(np.float32),
              affines.get(f'image{i}'))
    label = np.zeros(size, np.uint8) if label is None else label
    write(root / case / f'{case}_mask.nii.gz', label, affines.get('mask'))


def dataset(root, pipeline=(), channels=2, **kwargs):
    from vmamba_mm.registry import DATASETS

    return DATASETS.build(dict(
        dict(type='vmamba_mm.VolumeDataset', data_root=str(root), mask='{case}_mask.nii.gz',
             images=[f'{{case}}_{i}.nii.gz' for i in range(channels)], pipeline=list(pipeline)),
        **kwargs))


def pipeline(*transforms, num_classes=3):
    return [dict(type='vmamba_mm.LoadVolume'),
            dict(type='vmamba_mm.MonaiTransforms', transforms=list(transforms)),
            dict(type='vmamba_mm.PackVolume', num_classes=num_classes)]


# --- data sets ----------------------------------------------------------------------------------

def test_cases_and_parts(tmp_path):
    for i in range(10):
        write_case(tmp_path, f'p{i}')
    everything = [info['case'] for info in dataset(tmp_path).load_data_list()]
    assert everything == [f'p{i}' for i in range(10)]
    parts = [[info['case'] for info in dataset(tmp_path, split=split).load_data_list()]
             for split in ('train', 'val', 'test')]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert sorted(sum(parts, [])) == everything != sum(parts, [])
    assert parts[0] == [i['case'] for i in dataset(tmp_path, split='train').load_data_list()]
    (tmp_path / 'some.txt').write_text('p3\n\np1\n')
    listed = dataset(tmp_path, ann_file='some.txt').load_data_list()
    assert [info['case'] for info in listed] == ['p3', 'p1']
    assert listed[0]['files'][1] == str(tmp_path / 'p3/p3_1.nii.gz')


@pytest.mark.parametrize('change, message', [
    (dict(mask='{case}-seg.nii.gz'), 'p1 has no file .*p1-seg.nii.gz'),
    (dict(data_root='nowhere'), 'the folder nowhere of the volumes does not exist: put it there'),
    (dict(ann_file='none.txt'), r'cases .*none.txt cannot be read .*change ann_file='),
    (dict(split='test'), "has no case for split='test'")])
def test_what_is_missing_is_one_line(change, message, tmp_path):
    write_case(tmp_path)
    with pytest.raises(UserError, match=message):
        dataset(tmp_path, **change)


@pytest.mark.parametrize('change, message', [
    (dict(split='all'), "split='all' does not exist; choose 'train', 'val', 'test' or None"),
    (dict(fractions=(0.9, 0.2, 0.1)), 'together at most 1'),
    (dict(mask='{patient}-seg.nii.gz'), "no other braces, got '{patient}-seg.nii.gz'"),
    (dict(images=['{case.nii.gz']), "no other braces, got '{case.nii.gz'")])
def test_wrong_arguments_of_a_data_set(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **change)


# --- pipelines ----------------------------------------------------------------------------------

def test_a_volume_and_its_mask(tmp_path):
    label = np.zeros((6, 5, 4), np.int16)
    label[2:4, 1, 3] = 2
    write_case(tmp_path, label=label)
    sample = dataset(tmp_path, pipeline(dict(
        type='Transposed', keys=KEYS, indices=(0, 3, 2, 1))))[0]
    assert sample['inputs'].shape == (2, 4, 5, 6) and sample['inputs'].dtype == torch.float32
    assert type(sample['inputs']) is torch.Tensor
    found = sample['data_samples']
    assert found.case == 'p1' and found.label.dtype == torch.int64
    assert torch.equal(found.label[0], torch.from_numpy(label).permute(2, 1, 0).long())


def test_any_orientation_and_spacing(tmp_path):
    """The same anatomy, stored from left to right with 2 mm, comes out as the plain volume does."""
    label = np.zeros((6, 6, 4), np.uint8)
    label[1:3, :, 2:] = 1
    write_case(tmp_path / 'plain', label=label, size=label.shape)
    affine = np.diag([-1.0, 1, 2, 1])
    affine[0, 3] = 5
    flipped = {name: affine for name in ('image0', 'image1', 'mask')}
    write_case(tmp_path / 'other', label=label[::-1, :, ::2].copy(), size=(6, 6, 2), **flipped)
    steps = [dict(type='Orientationd', keys=KEYS, axcodes='RAS', labels=None),
             dict(type='Spacingd', keys=KEYS, pixdim=(1, 1, 1), mode=('bilinear', 'nearest'))]
    plain, other = (dataset(tmp_path / name, pipeline(*steps))[0]['data_samples'].label
                    for name in ('plain', 'other'))
    assert torch.equal(other[..., :3], plain[..., :3]) and other.any()


MOVED = np.diag([1.0, 1, 1, 1]) + np.outer([0, 0, 1, 0], [0, 0, 0, 7])


@pytest.mark.parametrize('change, message', [
    (dict(label=np.full((6, 5, 4), 4, np.uint8)),
     'the mask of p1 has the label 4; expected are 0 to 2'),
    (dict(label=np.full((6, 5, 4), 0.5, np.float32)), 'has the label 0.5; expected are 0 to 2'),
    (dict(label=np.full((6, 5, 4), -1, np.int16)), 'has the label -1'),
    (dict(label=np.zeros((6, 5, 3), np.uint8)),
     'p1_mask.nii.gz has 6x5x3 voxels and .*p1_0.nii.gz 6x5x4.*of one size'),
    (dict(mask=MOVED), 'p1_mask.nii.gz lies elsewhere than .*p1_0.nii.gz'),
    (dict(image1=MOVED), 'p1_1.nii.gz lies elsewhere'),
    (dict(size=(6, 5, 4, 2), label=np.zeros((6, 5, 4), np.uint8)),
     'p1_0.nii.gz has the shape .* and a single volume .X, Y, Z. is needed')])
def test_wrong_volumes_are_one_line(change, message, tmp_path):
    write_case(tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        dataset(tmp_path, pipeline())[0]
    assert '\n' not in str(caught.value)


def test_broken_and_infinite_volumes_are_one_line(tmp_path):
    write_case(tmp_path)
    values = np.zeros((6, 5, 4), np.float32)
    values[0, 0, 0] = np.nan
    write(tmp_path / 'p1/p1_1.nii.gz', values)
    with pytest.raises(UserError, match='the volume of p1 has values that are NaN or infinite'):
        dataset(tmp_path, pipeline())[0]
    (tmp_path / 'p1/p1_0.nii.gz').write_bytes(b'no volume')
    with pytest.raises(UserError, match='p1_0.nii.gz cannot be read as a volume: ') as caught:
        dataset(tmp_path, pipeline())[0]
    assert '\n' not in str(caught.value)


def test_steps_that_change_the_volume_alone(tmp_path):
    write_case(tmp_path)
    step = dict(type='SpatialPadd', keys=['image'], spatial_size=(8, 8, 8))
    with pytest.raises(UserError, match='the mask of p1 has 6x5x4 voxels and the volume 8x8x8'):
        dataset(tmp_path, pipeline(step))[0]


@pytest.mark.parametrize('build', [
    lambda: pipeline_step(type='vmamba_mm.LoadVolume'),
    lambda: pipeline_step(type='vmamba_mm.MonaiTransforms', transforms=[]),
    lambda: segmentor().slide(torch.zeros(1, 2, 32, 16, 16))])
def test_without_monai(build, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name, *args: None if name == 'monai' else find_spec(name, *args))
    with pytest.raises(UserError, match="monai is not .*pip install 'vmamba_mm.monai.'"):
        build()


def pipeline_step(**settings):
    from vmamba_mm.registry import TRANSFORMS

    return TRANSFORMS.build(settings)


def test_wrong_transforms():
    from vmamba_mm.registry import TRANSFORMS

    for step, error, message in [
            (dict(type='Spacing3d'), ValueError, "monai.transforms has no 'Spacing3d'"),
            (dict(type='Spacingd', keys=KEYS, mm=1), TypeError, "Spacingd: .*'mm'")]:
        with pytest.raises(error, match=message):
            TRANSFORMS.build(dict(type='vmamba_mm.MonaiTransforms', transforms=[step]))


# --- the model ----------------------------------------------------------------------------------

def segmentor(**kwargs):
    from vmamba_mm.registry import MODELS

    torch.manual_seed(0)
    return MODELS.build({**dict(
        type='vmamba_mm.VolumeSegmentor',
        backbone=dict(type='vmamba_mm.SegMambaEncoder', arch=dict(SMALL), in_channels=2),
        decode_head=dict(type='vmamba_mm.ResidualDecoder', in_channels=SMALL['embed_dims'],
                         num_classes=3, image_channels=2, hidden_dims=12),
        test_cfg=dict(patch_size=(32, 16, 16))), **kwargs})


def test_windows():
    """A volume of the window's size is one window; a smaller one is padded and cropped again."""
    model = segmentor().eval()
    with torch.no_grad():
        volume = torch.randn(1, 2, 32, 16, 16)
        torch.testing.assert_close(model.slide(volume), model(volume))
        assert model.slide(volume[..., :9, :5]).shape == (1, 3, 32, 9, 5)
        assert model.slide(torch.randn(1, 2, 50, 17, 16)).shape == (1, 3, 50, 17, 16)
        model.test_cfg['mirror_axes'] = (2,)
        expected = (model(volume) + model(volume.flip(4)).flip(4)) / 2
        torch.testing.assert_close(model.slide(volume), expected)


@pytest.mark.parametrize('loss', ['ce', 'dice_ce'])
def test_an_empty_mask_has_a_finite_loss(loss):
    model = segmentor(loss=loss)
    batch = dict(inputs=torch.randn(1, 2, 32, 16, 16), mode='loss', data_samples=[
        BaseDataElement(label=torch.zeros(1, 32, 16, 16, dtype=torch.long))])
    value = model(**batch)['loss']
    value.backward()
    assert value.isfinite() and model.decode_head.conv_seg.bias.grad.isfinite().all()


@pytest.mark.parametrize('change, message', [
    (dict(loss='dice'), r"loss='dice' does not exist; choose one of \('ce', 'dice_ce'\)"),
    (dict(test_cfg=dict(window=3)), r"test_cfg has unknown keys \['window'\]"),
    (dict(test_cfg=dict(overlap=1.0)), r'overlap must be in \[0, 1\)'),
    (dict(test_cfg=dict(mode='linear')), "mode='linear' does not exist; choose 'gaussian'"),
    (dict(test_cfg=dict(mirror_axes=(3,))), 'mirror_axes must be some of 0, 1 and 2')])
def test_wrong_arguments_of_a_model(change, message):
    with pytest.raises(ValueError, match=message):
        segmentor(**change)


def test_volumes_of_several_sizes_are_no_batch():
    with pytest.raises(UserError, match='of one size, got 4x4x4, 4x4x5: cut patches'):
        segmentor().data_preprocessor(dict(inputs=[torch.zeros(2, 4, 4, s) for s in (4, 5)]))


# --- metrics ------------------------------------------------------------------------------------

def cubes(*places):
    volume = torch.zeros(8, 8, 8, dtype=torch.long)
    for label, start in places:
        volume[start:start + 2, :2, :2] = label
    return volume


def measure(cases, **kwargs):
    from vmamba_mm.registry import METRICS

    metric = METRICS.build(dict(type='vmamba_mm.VolumeDice', with_hd95=True,
                                regions=dict(all=[1, 2], two=[2]), **kwargs))
    metric.process(None, [dict(pred=p, label=y[None]) for p, y in cases])
    return metric.evaluate(len(cases))


def test_dice_and_hd95():
    """Of cubes one voxel apart, half of each lies in the other."""
    found = measure([(cubes((1, 0)), cubes((2, 1))), (cubes((2, 0)), cubes((2, 0)))])
    assert found == pytest.approx({'dice_all': 0.75, 'dice_two': 0.5, 'dice': 0.625,
                                   'hd95_all': 0.5, 'hd95_two': 25.0, 'hd95': 12.75})
    apart = measure([(cubes((2, 0)), cubes((2, 1)))], spacing=(3.0, 1.0, 1.0))
    assert apart['hd95_two'] == pytest.approx(3.0)


def test_empty_regions():
    empty = [(cubes(), cubes())]
    assert measure(empty)['dice'] == 1 and measure(empty)['hd95'] == 0
    assert measure(empty, both_empty=(0.0, 50.0)) == pytest.approx(
        {k: 0.0 if k.startswith('dice') else 50.0 for k in measure(empty)})
    assert measure([(cubes(), cubes((1, 0)))])['dice_all'] == 0


# --- all of it ----------------------------------------------------------------------------------

def test_a_run_on_mmengine(tmp_path):
    """Two steps and a validation of whole volumes, by mmengine's Runner."""
    from mmengine.runner import Runner

    label = np.zeros((20, 18, 36), np.uint8)
    label[5:9, 5:9, 9:20] = 2
    for i in range(2):
        write_case(tmp_path / 'data', f'p{i}', size=label.shape, label=label)
    patches = [dict(type='Transposed', keys=KEYS, indices=(0, 3, 2, 1)),
               dict(type='RandCropByPosNegLabeld', keys=KEYS, label_key='label',
                    spatial_size=(32, 16, 16))]

    def loader(*steps):
        return dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
                    collate_fn=dict(type='pseudo_collate'), dataset=dataset(
                        tmp_path / 'data', pipeline(*steps)))

    runner = Runner(
        segmentor(), str(tmp_path / 'work'), loader(*patches), loader(patches[0]),
        train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg=dict(),
        val_evaluator=dict(type='vmamba_mm.VolumeDice', regions=dict(tumour=[2])),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)), experiment_name='volumes',
        default_hooks=dict(checkpoint=None), randomness=dict(seed=0))
    runner.train()
    assert 0 <= runner.message_hub.get_scalar('val/dice').current() <= 1
