"""The ablations of the paper's tables 10 to 15: each config builds and trains one step."""
import re
from pathlib import Path

import pytest

from vmamba_mm.families.vmamba import ARCHS

FOLDER = Path(__file__).resolve().parents[1] / 'configs/vmamba/ablations'
# What each changes of tiny_s1l8. Its depths are those of tiny_s2l5 where SS2D is wider.
L5 = dict(depths=(2, 2, 5, 2))
ROWS = {
    'unidirectional': dict(scan='unidirectional'),
    'bidirectional': dict(scan='bidirectional'),
    'cascade': dict(scan='cascade'),
    'no-dwconv': dict(conv_kernel=0),
    'no-dwconv-unidirectional': dict(conv_kernel=0, scan='unidirectional'),
    'no-dwconv-bidirectional': dict(conv_kernel=0, scan='bidirectional'),
    'no-dwconv-cascade': dict(conv_kernel=0, scan='cascade'),
    'init-random': dict(ssm_init='random'),
    'init-zero': dict(ssm_init='zero'),
    'dstate2': dict(L5, d_state=2, ssm_ratio=2.0),
    'dstate4': dict(L5, d_state=4, ssm_ratio=2.0),
    'dstate8': dict(L5, d_state=8, ssm_ratio=1.5),
    'dstate16': dict(L5, d_state=16, ssm_ratio=1.0),
    's1l5': dict(L5, ssm_ratio=1.0),
    'mlp3': dict(mlp_ratio=3.0, ssm_ratio=1.5),
    'mlp2': dict(mlp_ratio=2.0, ssm_ratio=2.5),
    'act-gelu': dict(act='gelu'),
    'act-relu': dict(act='relu'),
}


def name_of(row):
    return f'vmamba-tiny-{row}_8xb128_in1k-224'


def test_every_file_is_a_row():
    assert {path.stem for path in FOLDER.glob('*.py')} == {name_of(row) for row in ROWS}


@pytest.mark.parametrize('row', ROWS)
def test_config(row, read_config):
    """The ImageNet recipe of T[s1l8] but for the architecture; the README counts its parameters."""
    import torch
    from mmengine.registry import MODELS
    cfg = read_config(FOLDER / f'{name_of(row)}.py')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.backbone.arch == dict(ARCHS['tiny_s1l8'], **ROWS[row])
    counted = re.search(rf'{re.escape(name_of(row))}\.py\).*?\| ([\d.]+) M ',
                        (FOLDER / 'README.md').read_text())
    assert counted, 'the README has no row for it'
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}' == counted[1]

    recipe = read_config(FOLDER.parent / 'vmamba-tiny-s1l8_8xb128_in1k-224.py')
    for one in (cfg, recipe):
        one.model.backbone.pop('arch')
    assert cfg.to_dict() == recipe.to_dict()


@pytest.mark.parametrize('row', ROWS)
def test_one_step(row, read_config):
    """With Mixup, CutMix and the optimizer of the config; narrower and shallower than published."""
    import torch
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS
    from mmpretrain.structures import DataSample
    cfg = read_config(FOLDER / f'{name_of(row)}.py')
    cfg.model.backbone.arch.update(embed_dims=16, depths=(1, 1, 2, 1))
    cfg.model.head.in_channels = 128
    cfg.model.backbone.drop_path_rate = 0.0  # it could leave a block out for both images
    torch.manual_seed(0)
    model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}).train()

    cfg.optim_wrapper.type = 'OptimWrapper'  # the Amp one refuses a machine without a GPU
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = dict(inputs=torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8),
                 data_samples=[DataSample().set_gt_label(label) for label in (3, 7)])
    loss = model.train_step(batch, optim_wrapper)['loss']
    assert 4 < loss < 10  # log(1000) is 6.9
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
