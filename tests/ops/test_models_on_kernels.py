"""Models whose forward differs where kernels run: there they give what PyTorch gives elsewhere."""

import pytest
import torch
from emulated_cuda import NEEDS_COMPILER, emulated_gpu

from vmamba_mm.testing import assert_close

pytestmark = NEEDS_COMPILER

MODELS = {
    'RMT': dict(embed_dims=(32, 32, 64, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2),
                mlp_ratios=(2, 2, 2, 2), layer_scales=(0.5, 0, 0, 0)),
    'VisionRWKV': dict(embed_dims=48, depth=2, patch_size=4, image_size=16, formula='official',
                       post_norm=True, layer_scale=0.5),
    'VMUNet': dict(embed_dims=48, depths=(1, 2), decoder_depths=(2, 1), d_state=16)}


def run(model, images):
    """The last output, and the gradients by the parameters."""
    model.zero_grad()
    y = model(images)[-1]
    y.sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('name', MODELS)
def test_the_same_on_kernels(name, tmp_path):
    models = pytest.importorskip('vmamba_mm.models')
    torch.manual_seed(0)
    model = getattr(models, name)(MODELS[name]).eval()
    images = torch.randn(2, 3, 40, 56 if name == 'RMT' else 20)
    expected, grads = run(model, images)
    with emulated_gpu(tmp_path):
        y, found = run(model, images)
        assert_close(y, expected, 1e-6)
        assert found.keys() == grads.keys()
        for key, grad in found.items():
            assert_close(grad, grads[key], 1e-4, key)  # those by keys nearly cancel out
        with torch.no_grad():
            assert_close(model(images)[-1], expected, 1e-6)
