"""mmpretrain's own tool for class activation maps, on the layer that it chooses by itself."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='vmamba_mm.VMamba', out_indices=(3,), arch=dict(
        embed_dims=8, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
        conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
        scan='cross')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=64, topk=(1,)))
data_preprocessor = dict(num_classes=3, mean=[120] * 3, std=[60] * 3, to_rgb=True)
test_dataloader = dict(dataset=dict(type='CustomDataset', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(160, 96)),
    dict(type='PackInputs')]))
"""


class ActivationsAndGradients:
    """As pytorch_grad_cam's: what a hook on a layer sees, and the gradient of that."""

    def __init__(self, model, target_layers, reshape_transform):
        self.model, self.reshape = model, reshape_transform or (lambda x: x)
        self.handles = [layer.register_forward_hook(self.save) for layer in target_layers]

    def save(self, module, inputs, output):
        self.activation = self.reshape(output).detach()
        output.register_hook(lambda grad: setattr(self, 'gradient', self.reshape(grad)))

    def release(self):
        for handle in self.handles:
            handle.remove()


class BaseCAM:
    pass


class GradCAM(BaseCAM):
    """As pytorch_grad_cam's: maps are (B, C, H, W)."""

    def __init__(self, model, target_layers, use_cuda=False, reshape_transform=None):
        self.model, self.target_layers = model, target_layers
        self.activations_and_grads = ActivationsAndGradients(model, target_layers,
                                                             reshape_transform)

    def __call__(self, x, targets=None, eigen_smooth=False, aug_smooth=False):
        logits = self.model(x)
        logits.max(1).values.sum().backward()
        found = self.activations_and_grads
        return scaled_cam(found.activation, found.gradient, x)


def scaled_cam(maps, grads, x):
    """(B, H, W) from 0 to 1, of the size of the images."""
    cam = (grads.mean((2, 3), keepdim=True) * maps).sum(1).relu()[0].numpy()
    cam = (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)
    return cv2.resize(cam, (x.shape[3], x.shape[2]))[None]


@pytest.fixture
def tool(mm, monkeypatch):
    """mmpretrain's vis_cam.py, beside a stand-in for pytorch_grad_cam, which it needs."""
    from mmengine.registry import DefaultScope

    mmpretrain = pytest.importorskip('mmpretrain')
    package = ModuleType('pytorch_grad_cam')
    package.GradCAMPlusPlus, package.base_cam = GradCAM, ModuleType('base_cam')
    package.base_cam.BaseCAM = BaseCAM
    modules = {'activations_and_gradients': {'ActivationsAndGradients': ActivationsAndGradients},
               'utils': {}, 'utils.image': {'show_cam_on_image': lambda image, cam, use_rgb: cam}}
    monkeypatch.setitem(sys.modules, 'pytorch_grad_cam', package)
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f'pytorch_grad_cam.{name}', module)
    path = Path(mmpretrain.__file__).parent / '.mim/tools/visualization/vis_cam.py'
    spec = importlib.util.spec_from_file_location('vis_cam', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with DefaultScope.overwrite_default_scope('mmpretrain'):  # as in a process of its own
        yield module


def test_stock_tool_draws_the_backbone_s_map(tool, monkeypatch, tmp_path, capsys):
    """It takes the last norm, norm3, and reads what a hook sees there as (B, C, H, W)."""
    from mmengine.config import Config
    from mmpretrain.apis import get_model

    torch.manual_seed(0)
    (tmp_path / 'config.py').write_text(CONFIG)
    model = get_model(Config.fromfile(tmp_path / 'config.py'), device='cpu')
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    image = np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8)
    image[20:60, 90:150] = (250, 60, 30)
    Image.fromarray(image).save(tmp_path / 'image.png')

    drawn = []
    monkeypatch.setattr(tool, 'show_cam_grad', lambda cam, *args, **kwargs: drawn.append(cam))
    monkeypatch.setattr(sys, 'argv', ['vis_cam.py', *(str(tmp_path / name) for name in (
        'image.png', 'config.py', 'model.pth'))])
    tool.main()
    assert '"backbone.norm3"' in capsys.readouterr().out

    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - 120) / 60
    maps = model.eval().backbone(x)[-1]
    maps.retain_grad()
    model.head((maps.mean((2, 3)),)).max(1).values.sum().backward()
    expected = scaled_cam(maps.detach(), maps.grad, x)
    assert expected.std() > 0.1
    np.testing.assert_allclose(drawn[0], expected, atol=1e-4)
