"""The recipes of VMamba with Mamba-2's operator, which has no rows in the zoo."""

import json
from pathlib import Path

import pytest
import torch
from official import SHARED

from vmamba_mm import zoo

FOLDER = Path(__file__).resolve().parents[1] / 'configs/vmamba/m2'
#: Typed from the public code: drop path, channels of the last stage, parameters.
MODELS = {'tiny': (0.2, 768, 25_340_296), 'small': (0.3, 768, 39_079_816),
          'base': (0.3, 1024, 67_527_528)}


def test_every_file_is_a_model_that_nobody_trained():
    assert {path.stem for path in FOLDER.glob('*.py')} == {
        f'vmamba-{size}-m2_8xb128_in1k-224' for size in MODELS}
    assert not any(zoo.entries('vmamba', f'{size}_m2') for size in MODELS)


@pytest.mark.parametrize('size', MODELS)
def test_config(size, read_config):
    """The ImageNet recipe of the other VMambas but for the model; the README counts it."""
    from mmengine.registry import MODELS as REGISTRY
    drop_path, channels, parameters = MODELS[size]
    cfg = read_config(FOLDER / f'vmamba-{size}-m2_8xb128_in1k-224.py')
    assert cfg.model.backbone.arch == f'{size}_m2'
    assert cfg.model.backbone.drop_path_rate == drop_path
    with torch.device('meta'):
        model = REGISTRY.build(cfg.model)
    assert model.backbone.num_features[-1] == channels
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f'| {parameters:,} | {drop_path} |' in (FOLDER / 'README.md').read_text()
    keys = SHARED / 'facts/keys/vmamba_m2.json'
    if keys.is_file():
        assert json.loads(keys.read_text())[f'vmamba_{size}_m2']['params'] == parameters

    recipe = read_config(FOLDER.parent / 'vmamba-tiny-s1l8_8xb128_in1k-224.py')
    for one in (cfg, recipe):
        one.model.backbone.pop('arch')
        one.model.backbone.pop('drop_path_rate')
        one.model.head.pop('in_channels')
    assert cfg.to_dict() == recipe.to_dict()


def test_one_step(read_config):
    """With Mixup, CutMix and the optimizer of the config; narrower and shallower than published."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS as REGISTRY
    from mmpretrain.structures import DataSample
    cfg = read_config(FOLDER / 'vmamba-tiny-m2_8xb128_in1k-224.py')
    cfg.model.backbone.update(drop_path_rate=0.0, arch=dict(
        base='tiny_m2', embed_dims=16, depths=(1, 1, 2, 1), d_state=4))
    cfg.model.head.in_channels = 128
    torch.manual_seed(0)
    model = REGISTRY.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}).train()
    cfg.optim_wrapper.type = 'OptimWrapper'  # the Amp one refuses a machine without a GPU
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decays = {id(p): g['weight_decay'] for g in optim_wrapper.optimizer.param_groups
              for p in g['params']}
    for name, p in model.named_parameters():  # those of a route decay, as in the public code
        assert decays[id(p)] == (0.0 if p.ndim == 1 or name.endswith('.bias') else 0.05), name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = dict(inputs=torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8),
                 data_samples=[DataSample().set_gt_label(label) for label in (3, 7)])
    loss = model.train_step(batch, optim_wrapper)['loss']
    assert 4 < loss < 10  # log(1000) is 6.9
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
