"""The published recipes of VM-UNet: rates and decay, losses, and a step of each kind."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import SIZE, learning_rates, settings_of, take_a_step
from specs import SPECS

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/vm_unet/')]


def test_published_rows():
    assert {entry_of(leaf).dataset for leaf in ALL} == {'ISIC 2017', 'ISIC 2018', 'Synapse'}


@pytest.mark.parametrize('leaf', ALL)
def test_recipe(leaf, load, build_meta):
    cfg, model = load(leaf), build_meta(leaf)
    assert model.backbone.out_indices == (7,) and cfg.model.backbone.init_cfg.from_vmamba
    assert cfg.model.backbone.drop_path_rate == 0.2
    is_isic = 'isic' in leaf
    assert model.decode_head.conv_seg.out_channels == (1 if is_isic else 9)
    losses = [type(loss).__name__ for loss in model.decode_head.loss_decode]
    assert losses == ['CrossEntropyLoss', 'DiceLoss']
    settings, _ = settings_of(model, cfg)
    assert set(settings.values()) == {(1.0, 1e-2)}
    found = learning_rates(cfg, 2, 600)
    half = 100 if is_isic else 200
    assert found[0] == pytest.approx(1e-3) and found[half] == min(found) == pytest.approx(1e-5)
    assert found[2 * half] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize('leaf', [ALL[0], ALL[-1]])
def test_a_step(leaf, load):
    def narrowed(cfg):
        model = cfg.model
        model.backbone.update(arch=dict(SPECS['vm_unet'].first), init_cfg=None, drop_path_rate=0.0)
        model.decode_head.update(in_channels=2, channels=2)
        model.data_preprocessor.size = (SIZE, SIZE)
        return model

    cfg = load(leaf)
    take_a_step(cfg, narrowed, num_classes=cfg.model.decode_head.num_classes)


def test_isic_pipelines_run(load, tmp_path):
    """Black and white masks of the size of the photograph, which evaluation resizes alone."""
    import numpy as np
    from mmengine.dataset import Compose
    from PIL import Image

    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    Image.fromarray(np.stack([mask] * 3, -1)).save(tmp_path / 'image.png')
    cfg = load(ALL[0])
    for loader, shape in ((cfg.train_dataloader, (256, 256)), (cfg.val_dataloader, (30, 40))):
        found = Compose(loader.dataset.pipeline)(dict(
            img_path=str(tmp_path / 'image.png'), seg_map_path=str(tmp_path / 'mask.png'),
            seg_fields=[], reduce_zero_label=False))
        labels = found['data_samples'].gt_sem_seg.data[0]
        assert found['inputs'].shape == (3, 256, 256) and labels.shape == shape
        assert set(labels.unique().tolist()) == {0, 1}
    assert np.array_equal(labels, mask > 0)
