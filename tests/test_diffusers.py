"""DiS in diffusers: the model and the pipeline are saved and loaded, and make what they should."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vmamba_mm.errors import UserError
from vmamba_mm.models import DiS

diffusers = pytest.importorskip('diffusers', reason='needs vmamba_mm[diffusion]')

from vmamba_mm.diffusers import (  # noqa: E402
    DiS2DModel,
    DiSPipeline,
    RespacedDDIMScheduler,
    published_scheduler,
)

ARCH = dict(embed_dims=12, depth=4, patch_size=2, image_size=8, in_channels=3, num_classes=5)
PLAIN = dict(ARCH, num_classes=0, learn_sigma=False, skip=False, norm='ln')


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def make(arch=ARCH):
    torch.manual_seed(0)
    model = DiS2DModel.from_arch(arch).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_pipe(arch=ARCH, vae=None, **options):
    pipe = DiSPipeline(make(arch), published_scheduler(**options), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, labels=(1, 2), **kwargs):
    kwargs = dict(num_inference_steps=3, output_type='pt') | kwargs
    return pipe(class_labels=labels if labels is None else list(labels),
                generator=torch.manual_seed(0), **kwargs).images


# --- the model ----------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', [ARCH, PLAIN], ids=['small', 'plain'])
def test_a_model_is_saved_and_loaded(tmp_path, arch):
    model = make(arch)
    model.save_pretrained(tmp_path)
    assert set(p.name for p in tmp_path.iterdir()) == {
        'config.json', 'diffusion_pytorch_model.safetensors'}
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['_class_name'] == 'DiS2DModel' and config['hidden_size'] == 12
    again = DiS2DModel.from_pretrained(tmp_path)
    assert again.config.num_classes == arch['num_classes'] and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    plain = DiS(arch)  # the same names
    plain.load_pretrained(str(tmp_path / 'diffusion_pytorch_model.safetensors'))
    x = torch.randn(2, 3, 8, 8)
    labels = torch.tensor([0, 5]) if arch['num_classes'] else None
    out = again(x, torch.tensor([3, 700]), class_labels=labels)
    assert torch.equal(out.sample, plain.eval()(x, torch.tensor([3, 700]), labels))
    assert torch.equal(again(x, torch.tensor([3, 700]), labels, return_dict=False)[0], out.sample)


def test_loading_is_strict(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / 'diffusion_pytorch_model.safetensors'
    state = load_file(path)
    for change, message in ((lambda s: s.pop('mid_block.norm.weight'), 'norm.weight .miss'),
                            (lambda s: s.update(extra=torch.zeros(1)), 'extra .unexpected')):
        changed = dict(state)
        change(changed)
        save_file(changed, path, metadata=dict(format='pt'))
        with pytest.raises(UserError, match=message):
            DiS2DModel.from_pretrained(tmp_path)


def test_files_of_the_public_code(tmp_path):
    model, other = make(), DiS(ARCH)
    torch.save(dict(model=other.state_dict(), ema=model.state_dict(), opt={},
                    args=argparse.Namespace(model='DiS-S/2')), tmp_path / 'a.pt')
    found = DiS2DModel.from_checkpoint(tmp_path / 'a.pt')
    assert found.arch == DiS(ARCH).arch
    assert torch.equal(found.pos_embed, model.pos_embed)
    raw = DiS2DModel.from_checkpoint(tmp_path / 'a.pt', weights='model')
    assert torch.equal(raw.pos_embed, other.pos_embed)


def test_gradient_checkpointing_and_guidance():
    model = make().train()
    x, t, labels = torch.randn(4, 3, 8, 8), torch.full((4,), 7), torch.tensor([1, 2, 5, 5])
    assert not model.is_gradient_checkpointing
    model(x, t, labels).sample.square().mean().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing and model.mid_block.with_cp
    model(x, t, labels).sample.square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-7)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    plain = DiS(ARCH).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval().forward_with_cfg(x, t, labels, 2.0),
                               plain.forward_with_cfg(x, t, labels, 2.0))


def test_wrong_arguments():
    with pytest.raises(ValueError, match='image_size.*multiple of'):
        DiS2DModel(sample_size=7, hidden_size=8, num_layers=2)
    with pytest.raises(ValueError, match='needs labels'):
        make()(torch.randn(1, 3, 8, 8), 0)


# --- the pipeline -------------------------------------------------------------------------------

def test_a_pipeline_is_saved_and_loaded(tmp_path):
    pipe = make_pipe()
    expected = call(pipe)
    assert expected.shape == (2, 3, 8, 8) and 0 <= expected.min() <= expected.max() <= 1
    pipe.save_pretrained(tmp_path)
    again = DiSPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(again), expected)
    again.scheduler = RespacedDDIMScheduler.from_config(pipe.scheduler.config)
    again.save_pretrained(tmp_path / 'ddim')
    ddim = DiSPipeline.from_pretrained(tmp_path / 'ddim')
    assert isinstance(ddim.scheduler, RespacedDDIMScheduler)


def test_guidance_is_that_of_the_model():
    """By hand, with the same noise: of a step from the last time to the image itself."""
    pipe = make_pipe(clip_sample=True)
    noise = torch.randn(2, 3, 8, 8)
    labels, none = torch.tensor([1, 2]), torch.tensor([5, 5])
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    for scale, channels in ((1, 3), (2.5, 3), (2.5, 2)):
        with torch.no_grad():
            if scale == 1:
                out = pipe.model(noise, t, labels).sample
            else:
                out = pipe.model.forward_with_cfg(torch.cat((noise, noise)), t,
                                                  torch.cat((labels, none)), scale, channels)[:2]
            expected = pipe.scheduler.step(out, t, noise, generator=torch.manual_seed(0))
        found = call(pipe, num_inference_steps=1, latents=noise, guidance_scale=scale,
                     guided_channels=channels, output_type='latent')
        torch.testing.assert_close(found, expected.prev_sample)


def test_outputs_and_classes():
    pipe, plain = make_pipe(), make_pipe(PLAIN, variance_type='fixed_small')
    pictures = call(pipe, output_type='pil')
    assert [p.size for p in pictures] == [(8, 8)] * 2 and pictures[0].mode == 'RGB'
    arrays, tensors = call(pipe, output_type='np'), call(pipe)
    np.testing.assert_allclose(arrays, tensors.permute(0, 2, 3, 1).numpy())
    assert pipe(class_labels=3, num_inference_steps=2, output_type='pt',
                return_dict=False)[0].shape == (1, 3, 8, 8)
    assert call(plain, None, batch_size=3).shape == (3, 3, 8, 8)
    # A generator for each image: the image does not depend on the batch.
    of_each = [torch.Generator().manual_seed(i) for i in (5, 6)]
    two = pipe(class_labels=[1, 2], generator=of_each, num_inference_steps=2, output_type='pt')
    one = pipe(class_labels=[2], generator=[torch.Generator().manual_seed(6)],
               num_inference_steps=2, output_type='pt')
    torch.testing.assert_close(two.images[1:], one.images)


def test_latents_are_decoded(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    pipe = make_pipe(dict(ARCH, in_channels=4), vae)
    latents = call(pipe, output_type='latent')
    images = call(pipe)
    assert latents.shape == (2, 4, 8, 8) and images.shape == (2, 3, 16, 16)
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    pipe.save_pretrained(tmp_path)
    again = DiSPipeline.from_pretrained(tmp_path)
    assert isinstance(again.vae, diffusers.AutoencoderKL)


@pytest.mark.parametrize('labels, kwargs, message', [
    (None, {}, 'has 5 classes: say by class_labels'), ((6,), {}, 'whole numbers from 0 to 5'),
    ((1.5,), {}, 'whole numbers'), ((), {}, 'whole numbers'),
    ((1,), dict(output_type='jpg'), "output_type='jpg' does not exist.*'pil'"),
    ((1,), dict(num_inference_steps=0), 'num_inference_steps must be'),
    ((1,), dict(latents=torch.zeros(1, 4, 8, 8)), r'latents must be of the shape \(1, 3, 8, 8\)')])
def test_wrong_calls(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(make_pipe(), labels, **kwargs)


def test_wrong_calls_without_classes():
    with pytest.raises(ValueError, match='has no classes: leave class_labels out'):
        call(make_pipe(PLAIN))
    with pytest.raises(ValueError, match="learned_range.*predicts no variance.*'fixed_small'"):
        call(make_pipe(PLAIN), None)
    with pytest.raises(ValueError, match='1 generators do not fit 2 images'):
        make_pipe()(class_labels=[1, 2], generator=[torch.manual_seed(0)])


def test_without_diffusers_one_line_says_how_to_get_it():
    done = subprocess.run([sys.executable, '-c', '''
import importlib.util as u
real = u.find_spec
u.find_spec = lambda name, *args: None if name == 'diffusers' else real(name, *args)
from vmamba_mm.errors import UserError
try:
    import vmamba_mm.diffusers
except UserError as err:
    print(err)
'''], capture_output=True, text=True, check=True)
    assert done.stdout == ("the package diffusers is not installed; install it with: "
                           "pip install 'vmamba_mm[diffusion]'\n")
