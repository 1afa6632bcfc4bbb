"""The recipe of small_data.py: its settings, the augmentation, the learning rate."""

import math

RECIPE = dict(weight_decay=0.05, warm_up=0.1, final_lr=0.01, max_norm=5.0, label_smoothing=0.1,
              drop_path_rate=0.1, crop_area=(0.25, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5,
              colour=0.3)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def normalise(images):
    """uint8 or float of 0 to 255 to fp32 of about mean 0 and deviation 1."""
    import torch

    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() - mean) / std


def augment(images, size, generator):
    """Random resized crops, flips, and brightness, contrast and saturation, for a batch at once.

    Args:
        images: (B, 3, S, S) uint8.
        size: side of the crops.
        generator: on the same device; all draws come from it.

    Returns:
        (B, 3, size, size) fp32, normalised.
    """
    import torch
    import torch.nn.functional as F

    count, device = len(images), images.device

    def uniform(low, high):
        return torch.empty(count, device=device).uniform_(low, high, generator=generator)

    area = uniform(*RECIPE['crop_area'])
    ratio = uniform(*(math.log(r) for r in RECIPE['crop_ratio'])).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = 1 - 2 * (uniform(0, 1) < RECIPE['flip']).float()
    theta = torch.zeros(count, 2, 3, device=device)  # the image is -1 to 1
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, (1 - width) * uniform(-1, 1)
    theta[:, 1, 1], theta[:, 1, 2] = height, (1 - height) * uniform(-1, 1)
    grid = F.affine_grid(theta, (count, 3, size, size), align_corners=False)
    x = F.grid_sample(images.float(), grid, padding_mode='border', align_corners=False)
    factors = [uniform(1 - RECIPE['colour'], 1 + RECIPE['colour']).view(-1, 1, 1, 1)
               for _ in range(3)]
    grey = torch.tensor((0.299, 0.587, 0.114), device=device).view(1, 3, 1, 1)
    x = x * factors[0]
    x = torch.lerp((x * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True), x, factors[1])
    x = torch.lerp((x * grey).sum(1, keepdim=True), x, factors[2])
    return normalise(x.clamp(0, 255))


def lr_factor(step, steps):
    """The factor of the learning rate: a linear warm-up, then a cosine to RECIPE['final_lr']."""
    warm_up = max(1, round(RECIPE['warm_up'] * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - 1 - warm_up)
    low = RECIPE['final_lr']
    return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
