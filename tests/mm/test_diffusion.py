"""The training of a denoising model on mmengine: losses, samples, latents, crop and FID."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from vmamba_mm.errors import UserError
from vmamba_mm.registry import METRICS, MODELS, TRANSFORMS

diffusers = pytest.importorskip('diffusers', reason='needs vmamba_mm[diffusion]')

ARCH = dict(embed_dims=8, depth=2, patch_size=2, image_size=8, in_channels=3, num_classes=4,
            d_state=2)


@pytest.fixture(autouse=True)
def registries(mm):
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def make(arch=ARCH, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type='vmamba_mm.DiffusionModel', **{
        'backbone': dict(type='vmamba_mm.DiS', arch=arch), 'test_cfg': dict(num_steps=3),
        **kwargs}))


def samples(*labels):
    from mmpretrain.structures import DataSample
    return [DataSample().set_gt_label(label) if label is not None else DataSample()
            for label in labels]


# --- training -----------------------------------------------------------------------------------

def test_the_loss_is_that_of_the_diffusion():
    model = make(class_dropout=0.0)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    losses = model(x, samples(1, 3), 'loss')
    torch.manual_seed(1)
    t, noise = torch.randint(1000, (2,)), torch.randn_like(x)
    out = model.backbone(model.diffusion.add_noise(x, noise, t), t, torch.tensor([1, 3]))
    expected = model.diffusion.losses(out, x, noise, t)
    assert set(losses) == {'loss', 'mse', 'vb'}
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name].mean())
    parsed, logged = model.parse_losses(losses)
    torch.testing.assert_close(parsed, losses['loss'])  # the parts are only logged
    assert set(logged) == {'loss', 'mse', 'vb'}


def test_classes_are_dropped(monkeypatch):
    model, seen = make(class_dropout=0.5), []
    real = model.backbone.forward
    monkeypatch.setattr(model.backbone, 'forward',
                        lambda x, t, labels: seen.append(labels) or real(x, t, labels))
    model(torch.zeros(400, 3, 8, 8), samples(*[1, 3] * 200), 'loss')
    labels = torch.cat(seen)
    dropped = labels == 4
    assert 140 < dropped.sum() < 260
    assert torch.equal(labels[~dropped], torch.tensor([1, 3] * 200)[~dropped])
    with pytest.raises(ValueError, match='class_dropout must be'):
        make(class_dropout=1.0)


@pytest.mark.parametrize('labels, message', [
    ((1, None), 'has 4 classes, and a sample has none: .*with_label=True'),
    ((1, 4), 'has classes from 1 to 4, and the model 4 classes, from 0 on')])
def test_wrong_classes(labels, message):
    with pytest.raises(UserError, match=message):
        make()(torch.zeros(2, 3, 8, 8), samples(*labels), 'loss')


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"unknown keys \['steps'\]; it may have \['num_steps'"):
        make(test_cfg=dict(steps=3))
    with pytest.raises(ValueError, match='num_steps must be'):
        make(test_cfg=dict(num_steps=0))
    with pytest.raises(ValueError, match="mode must be 'tensor', 'loss' or 'predict'"):
        make()(torch.zeros(1, 3, 8, 8), mode='losses')
    model = make(test_cfg=dict(num_steps=2, scheduler=dict(type='DDPM')))
    with pytest.raises(ValueError, match="no scheduler 'DDPM'.*'DDPMScheduler'"):
        model.sample(1, torch.tensor([0]))
    model = make(test_cfg=dict(num_steps=2, scheduler=dict(
        type='DDIMScheduler', variance_type='learned_range', clip_sample=False)))
    with pytest.raises(ValueError, match=r"DDIMScheduler takes no \['variance_type'\]: leave"):
        model.sample(1, torch.tensor([0]))


# --- samples ------------------------------------------------------------------------------------

def test_samples_are_those_of_the_pipeline():
    from vmamba_mm.diffusers import DiS2DModel, DiSPipeline, published_scheduler
    model = make(test_cfg=dict(num_steps=4, guidance_scale=2.0)).eval()
    twin = DiS2DModel.from_arch(ARCH).eval()
    twin.load_state_dict(model.backbone.state_dict())
    pipe = DiSPipeline(twin, published_scheduler())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(class_labels=[1, 2], guidance_scale=2.0, num_inference_steps=4,
                    generator=torch.Generator().manual_seed(3), output_type='latent').images
    found = model.sample(2, torch.tensor([1, 2]), torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('classes', [4, 0])
def test_a_test_gives_each_sample_an_image(classes):
    model = make(dict(ARCH, num_classes=classes)).eval()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    found = model(x, samples(1, 3), 'predict')
    for sample, own in zip(found, x, strict=True):
        assert sample.pred.shape == (3, 8, 8) and sample.pred.dtype == torch.uint8
        assert (sample.image.float() / 127.5 - 1 - own).abs().max() <= 0.5 / 127.5 + 1e-6
    assert model(x, mode='tensor').shape == (2, 6, 8, 8)


# --- latents ------------------------------------------------------------------------------------

def test_latents(tmp_path):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1,
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2)
    vae.save_pretrained(tmp_path)
    arch = dict(ARCH, in_channels=4)
    model, plain = make(arch, vae=str(tmp_path)), make(arch)
    assert set(model.state_dict()) == set(plain.state_dict())
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    model(x, samples(0, 1), 'loss')['loss'].backward()
    assert not any(p.requires_grad for p in model.vae.model.parameters())
    assert copy.deepcopy(model).vae is model.vae  # an average of weights has no other
    torch.manual_seed(5)
    latents = model._encode(x)
    torch.manual_seed(5)
    expected = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    assert model.eval().sample(2, torch.tensor([0, 1])).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match='autoencoder vae=.*/absent.* cannot be read') as raised:
        make(arch, vae=str(tmp_path / 'absent'))(x, samples(0, 1), 'loss')
    assert '\n' not in str(raised.value)


# --- data and FID -------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', [(30, 20, 3), (8, 100, 3), (5, 4, 3), (33, 64, 1), (33, 64),
                                   (1, 9, 3)])
def test_the_crop_is_a_square_from_the_middle(shape):
    crop = TRANSFORMS.build(dict(type='vmamba_mm.HalvingCenterCrop', size=8))
    found = crop(dict(img=np.full(shape, 77, np.uint8)))
    assert found['img'].shape == (8, 8, *(shape[2:] or (1,))) and (found['img'] == 77).all()
    assert found['img_shape'] == (8, 8)


def test_the_crop_halves_first():
    """Means of 2x2 pixels, twice, of the square of 32 in the middle."""
    crop = TRANSFORMS.build(dict(type='vmamba_mm.HalvingCenterCrop', size=8))
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    found = crop(dict(img=image))['img'].astype(float)
    middle = image[:, 8:40].astype(float)
    expected = middle.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(found - expected).max() <= 2  # rounded in four passes
    with pytest.raises(ValueError, match='size must be an int'):
        TRANSFORMS.build(dict(type='vmamba_mm.HalvingCenterCrop', size=0))


class Means(nn.Module):
    def forward(self, images):
        return torch.stack([images.float().mean((1, 2, 3)), images.float()[:, 0].mean((1, 2))], 1)


def test_fid_is_the_distance_of_two_normal_distributions():
    metric = METRICS.build(dict(type='vmamba_mm.FrechetDistance', features=Means(), batch_size=3))
    torch.manual_seed(0)
    made, own = (torch.randint(0, high, (10, 3, 4, 4), dtype=torch.uint8) for high in (256, 180))
    for part in (slice(4), slice(4, 10)):
        metric.process(None, [dict(pred=a, image=b) for a, b in zip(
            made[part], own[part], strict=True)])
    found = metric.evaluate(10)['fid']
    first, second = (Means()(x).double() for x in (made, own))
    cov = [torch.cov(f.T) for f in (first, second)]
    root = torch.linalg.eigvals(cov[0] @ cov[1]).real.clamp(min=0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + cov[0].trace() + cov[1].trace() \
        - 2 * root
    assert found == pytest.approx(expected.item(), rel=1e-4)
    metric.process(None, [dict(pred=a[:1], image=a[:1]) for a in made])  # grey
    assert metric.evaluate(10)['fid'] == pytest.approx(0, abs=1e-3)
    metric.process(None, [dict(pred=made[0], image=own[0])])
    with pytest.raises(UserError, match='at least 2 images, and the test has 1'):
        metric.evaluate(1)
