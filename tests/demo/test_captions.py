"""The demo of captions: its set, the towers that learn where digits are, its config, the floor."""

import contextlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
from running import loading_tools

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

for package in ('mlxtend', 'skimage', 'sklearn'):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra 'demo')", allow_module_level=True)

CONFIG = CONFIGS / 'demo' / 'cobra_captions-64.py'
TOOLS = 'make_data', 'scenes', 'captions', 'caption_towers', 'run', 'vlm'


@pytest.fixture(scope='module')
def tools():
    with loading_tools() as load:
        yield {name: load(f'demo/{name}.py') for name in TOOLS}


@pytest.fixture(scope='module')
def root(tools, tmp_path_factory):
    path = tmp_path_factory.mktemp('demo')
    settings = {**tools['make_data'].DEFAULTS, 'captions': (12, 12)}
    tools['make_data'].build(path, settings, ['captions'])
    return path / 'captions'


def test_captions_name_digits_from_left_to_right(root, tools):
    images, items = tools['captions'].read(root, 'val')
    assert images.shape == (12, 64, 64, 3)
    assert {len(item['digits']) for item in items} == {1, 2}
    for item in items:
        middles = [2 * x + width for _, x, _, width, _ in item['digits']]
        assert middles == sorted(middles)
        names = [tools['scenes'].CLASSES[label] for label, *_ in item['digits']]
        answer = item['conversations'][1]['value']
        assert [word for word in answer.split() if word in tools['scenes'].CLASSES] == names
    assert tools['captions'].caption([3, 8]) == 'a three and an eight on a photograph'


def test_patches_of_digits(tools):
    items = [dict(digits=[[7, 0, 8, 16, 8], [2, 40, 40, 24, 24]]), dict(digits=[])]
    labels = tools['caption_towers'].patch_labels(items, 64, 8).reshape(2, 8, 8)
    assert (labels[0, 1, :2] == 7).all() and (labels[0, 5:, 5:] == 2).all()
    assert (labels != 10).sum() == 2 + 9


def test_towers_learn_and_are_those_of_the_config(root, tools, tmp_path, monkeypatch):
    _, seconds = tools['caption_towers'].train(root, tmp_path / 'towers', epochs=1, batch=6)
    cfg = cli.load_config(str(CONFIG))
    assert seconds > 0
    for i, (tower, own) in enumerate(zip(cfg.model.towers, tools['caption_towers'].TOWERS,
                                         strict=True)):
        assert {k: v for k, v in tower.items() if k != 'init_cfg'} == own
        assert tower.init_cfg.checkpoint == f'{tools["vlm"].TOWERS}/tower{i}.pth'
        tower.init_cfg.checkpoint = str(tmp_path / f'towers/tower{i}.pth')
    model = cli.build_model(cfg)
    model.init_weights()
    saved = torch.load(tmp_path / 'towers/tower0.pth')
    assert all(torch.equal(v, saved[k]) for k, v in model.towers[0].vit.state_dict().items())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 500_000


def test_config_reads_the_set(root):
    from mmengine.registry import DATASETS, init_default_scope

    cfg = cli.load_config(str(CONFIG))
    init_default_scope(cfg.default_scope)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(root)
        sample = DATASETS.build(loader.dataset)[0]
        assert sample['inputs'].shape == (3, 64, 64)
        (question, answer), = sample['data_samples'].turns
        assert question == 'What is there?' and answer.endswith(' on a photograph')


@pytest.mark.parametrize('is_right', [True, False])
def test_the_demo_from_end_to_end(root, tools, is_right, tmp_path, monkeypatch, capsys):
    """With a model that is made up: what is said, drawn and refused."""
    from PIL import Image

    demo, work_dir = tools['vlm'], tmp_path / 'work'

    def train(config, folder):
        folder.mkdir(parents=True)
        Image.new('RGB', (80, 30)).save(folder / 'curves.png')
        return 1.0, folder / 'last.pth'

    def run(name, log, *command):
        assert '--ask' in command
        (work_dir / 'predictions').mkdir()
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(work_dir / 'predictions/a.png')

    named = 91.0 if is_right else 79.0
    monkeypatch.setattr(demo.captions, 'read', lambda *args: tools['captions'].read(root, 'val'))
    monkeypatch.setattr(demo.caption_towers, 'train', lambda *args: (88.0, 2.0))
    for name, function in dict(train=train, run=run, begin=lambda *args: None, evaluate=lambda *a: (
            1.0, dict(named=named, exact=80.0))).items():
        monkeypatch.setattr(demo, name, function)
    monkeypatch.setattr(sys, 'argv', ['vlm.py', '--work-dir', str(work_dir)])
    with contextlib.nullcontext() if is_right else pytest.raises(SystemExit, match='fewer than 80'):
        demo.main()
    said = capsys.readouterr().out
    assert f'digits named right: {named} % on 12 held-out pictures (floor 80 %' in said
    assert (work_dir / 'report.png').is_file()
