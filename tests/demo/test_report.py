"""The page of a demo run, and what its configs must have in common with the set."""
from pathlib import Path

import pytest
from PIL import Image

from vmamba_mm.mm import cli

ROOT = Path(__file__).resolve().parents[2]


def test_contact_sheet_holds_every_picture(load_tool, tmp_path):
    report = load_tool('demo/report.py')
    folder = tmp_path / 'predictions'
    folder.mkdir()
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (250, 200, 0), (160, 0, 160)]
    for i, colour in enumerate(colours):
        Image.new('RGB', (64, 64), colour).save(folder / f'{i}.png')
    Image.new('RGB', (800, 300), (90, 90, 90)).save(tmp_path / 'curves.png')
    path = report.contact_sheet(tmp_path / 'page.png', 'A title', ['top1 = 95'],
                                tmp_path / 'curves.png', folder)
    with Image.open(path) as page:
        seen = {colour for _, colour in page.getcolors(1 << 20)}
    assert {*colours, (90, 90, 90)} <= seen


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_demo_config_fits_the_set(load_tool, task, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, scenes = load_tool('demo/run.py'), load_tool('demo/scenes.py')
    cfg = cli.load_config(run.DEMOS[task].config)
    assert cfg.model.backbone.arch.embed_dims == 32
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = cfg[name].dataset
        assert dataset.data_root.rstrip('/') == f'data/demo/{run.DEMOS[task].part}'
        classes = list(dataset.metainfo.classes)
        if task == 'cls':  # folders are read in alphabetical order
            assert classes == sorted(scenes.CLASSES)
        else:
            assert classes[:10] == list(scenes.CLASSES)
        # A mirrored digit is another digit, or none.
        assert not any('Flip' in step.type for step in dataset.pipeline)
