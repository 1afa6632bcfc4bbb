"""The published recipes of RSMamba: rates and decay, classes, and a step."""

import pytest
from leaves import LEAVES, entry_of
from small_recipes import learning_rates, make_small, settings_of, take_a_step
from zoo_classes import CLASSES

from vmamba_mm.mm.cli.runs import model_settings

ALL = [leaf for leaf in LEAVES if leaf.startswith('configs/rsmamba/')]


def test_published_rows():
    assert {(entry_of(leaf).arch, entry_of(leaf).dataset) for leaf in ALL} == {
        (arch, name) for arch in ('base', 'large', 'huge')
        for name in ('UC Merced', 'AID', 'RESISC45')}


@pytest.mark.parametrize('leaf', ALL)
def test_recipe(leaf, load, build_meta):
    cfg, model = load(leaf), build_meta(leaf)
    assert model.backbone.out_type == 'avg_featmap' and model.backbone.shuffle == 'training'
    count = CLASSES[entry_of(leaf).dataset]
    assert model.head.fc.out_features == cfg.data_preprocessor.num_classes == count
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert len(set(loader.dataset.classes)) == count
    settings, _ = settings_of(model, cfg)
    assert set(settings.values()) == {(1.0, 0.05)}
    found = learning_rates(cfg, 2, 1000)
    assert found[0] == pytest.approx(5e-7)
    assert max(found) == pytest.approx(5e-4) and found.index(max(found)) in (19, 20)
    assert found[-1] == pytest.approx(1e-5, rel=1e-2)


def test_a_step(load):
    take_a_step(load(ALL[0]), lambda cfg: model_settings(make_small(cfg, num_classes=10)))
