"""spandrel loads MambaIR's files, tells them from others, and runs them."""

import pytest
import torch

from vmamba_mm.models import MambaIR, MambaIRUNet, MambaIRv2

spandrel = pytest.importorskip('spandrel')

SMALL = {
    'sr': (MambaIR, dict(base='sr_x3', embed_dims=30, depths=(1,), d_state=2), 3, 'SR'),
    'light': (MambaIR, dict(base='light_x2_2024_03', embed_dims=30, depths=(1,), d_state=2), 3,
              'SR'),
    'jpeg': (MambaIR, dict(base='denoise', embed_dims=30, depths=(1,), d_state=2), 1,
             'Restoration'),
    'v2': (MambaIRv2, dict(base='light_x4', embed_dims=12, depths=(2,), num_heads=(2,), d_state=2,
                           window_size=4), 3, 'SR'),
    'unet': (MambaIRUNet, dict(base='real_denoise', embed_dims=30, depths=(1, 1, 1, 1), d_state=2,
                               refinement_depth=1), 3, 'Restoration')}


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('key', ['params', 'params_ema'])
def test_files(name, key, tmp_path):
    import vmamba_mm.spandrel

    cls, arch, channels, purpose = SMALL[name]
    torch.manual_seed(0)
    model = cls(arch, channels).eval()
    torch.save({key: model.state_dict()}, tmp_path / 'a.pth')
    found = spandrel.ModelLoader(device='cpu').load_from_file(tmp_path / 'a.pth')
    assert isinstance(found, spandrel.ImageModelDescriptor)
    assert type(found.model) is cls and found.model.arch == model.arch
    assert (found.purpose, found.scale) == (purpose, model.scale)
    assert (found.input_channels, found.output_channels) == (channels, channels)
    assert found.architecture in vmamba_mm.spandrel.ARCHITECTURES.values()
    x = torch.rand(1, channels, 11, 13)
    y = found.eval()(x)
    assert y.shape == (1, channels, 11 * model.scale, 13 * model.scale)
    if name != 'unet':  # which spandrel pads
        with torch.no_grad():
            assert torch.equal(y, model(x).clamp(0, 1))


def test_files_of_others_are_left_alone():
    import vmamba_mm.spandrel

    state = {'layers.0.residual_group.blocks.0.norm1.weight': torch.ones(4)}
    for arch in vmamba_mm.spandrel.ARCHITECTURES.values():
        assert not arch.detect(state)
    support = spandrel.MAIN_REGISTRY['SwinIR']
    assert support.architecture.id == 'SwinIR'
