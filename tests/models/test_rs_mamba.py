"""What is special about RS-Mamba: whole models, their official names, sizes, VMamba beside it."""

import json

import pytest
import torch
from official import shared

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch, infer_task, to_mm, to_official
from vmamba_mm.families import family_of
from vmamba_mm.families.rs_mamba import FAMILY
from vmamba_mm.heads import ConcatDecoder, RemoteSensingModel
from vmamba_mm.layers import SS2D
from vmamba_mm.models import RemoteSensingMamba, VMamba

SMALL = dict(base='tiny', embed_dims=8, depths=(1, 1, 1, 1), d_state=2)


@pytest.mark.parametrize('name, num_images', [('RSM_SS-tiny', 1), ('RSM_CD-tiny', 2)])
def test_published_keys(name, num_images):
    """Names and shapes of both models, and what is told from them."""
    listed = json.loads(shared('facts/keys/rs_mamba.json').read_text())[name]
    with torch.device('meta'):
        model = RemoteSensingModel('tiny', num_images=num_images)
        official = {k: torch.empty(shape) for k, shape in listed['keys'].items()}
    ours = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == listed['params']
    assert {k: list(v.shape) for k, v in to_official(ours).items()} == listed['keys']
    assert {k: v.shape for k, v in to_mm(official).items()} == {k: v.shape for k, v in ours.items()}
    assert family_of(official) is family_of(ours) is FAMILY
    assert infer_arch(official) == infer_arch(ours) == 'tiny'
    assert infer_task(ours) == 'seg'


@pytest.mark.parametrize('num_images', [1, 2])
@pytest.mark.parametrize('periodic', [False, True])
def test_official_files(tmp_path, num_images, periodic):
    torch.manual_seed(0)
    model = RemoteSensingModel(SMALL, num_images=num_images)
    official = to_official(model.state_dict())
    last = 'conv_out_change' if num_images == 2 else 'conv_out_seg'
    assert {f'{last}.weight', 'deocder_block1.fuse.0.weight', 'upsample_x4.5.running_var',
            'encoder_block2.downsample.1.weight'} <= set(official)
    torch.save(dict(net=official, optimizer={}) if periodic else official, tmp_path / 'a.pth')
    found = read_checkpoint(tmp_path / 'a.pth')['state_dict']
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    backbone = RemoteSensingMamba(SMALL, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    backbone.init_weights()
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[key])


@pytest.mark.parametrize('size', [(1, 1), (30, 50), (64, 33), (70, 100)])
def test_any_size(size):
    """Logits of the image's size, in multiples of 4."""
    model = RemoteSensingModel(SMALL).eval()
    expected = tuple(-(-side // 4) * 4 for side in size)
    assert model(torch.randn(1, 3, *size)).shape == (1, 1, *expected)


def test_diagonals_of_both_kinds():
    """With the same weights; each makes other logits, and has a gradient by all parameters."""
    torch.manual_seed(0)
    x, found = torch.randn(1, 3, 64, 96), []
    for scan in ('omnidirectional', 'omnidirectional-unwrapped'):
        torch.manual_seed(0)
        model = RemoteSensingModel(dict(SMALL, scan=scan))
        found.append(model(x))
        found[-1].square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.allclose(*found)


def test_routes_belong_to_models():
    """VMamba has four, and a file of it does not load here, nor the other way round."""
    assert SS2D(8, scan='omnidirectional').x_proj_weight.shape[0] == 8
    with pytest.raises(ValueError, match='8 routes and VMamba.* 4; RemoteSensingMamba takes it'):
        VMamba(dict(base='tiny_s1l8', scan='omnidirectional'))
    arch = dict(base='vanilla_tiny', embed_dims=8, depths=(1, 1, 1, 1), d_state=2, mlp_ratio=4.0,
                stem='conv', downsample='conv')
    vmamba, ours = VMamba(arch), RemoteSensingMamba(SMALL)
    assert family_of(vmamba.state_dict()).name == 'vmamba'
    assert family_of(ours.state_dict()) is FAMILY
    with pytest.raises(Exception, match='does not fit the model'):
        ours.load_state_dict(vmamba.state_dict())


def test_decoder_refuses_one_map():
    with pytest.raises(ValueError, match='at least two maps'):
        ConcatDecoder([8])
