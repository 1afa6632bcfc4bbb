"""The models and the images of the tools that analyse: from configs, checkpoints and files."""

from pathlib import Path

import numpy as np

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.command import add_weights_option
from vmamba_mm.mm.cli.configs import datasets_of
from vmamba_mm.mm.cli.runs import build_model
from vmamba_mm.mm.sources import IMAGE, SECOND_KEY

NONE = 'none'  # in place of a checkpoint


# --- several configs, with or without a checkpoint ------------------------------------------

def add_model_options(parser, of='config files', without=''):
    """CONFIG..., --checkpoint and --weights; :func:`check_model_options` belongs to it."""
    parser.add_argument('configs', metavar='CONFIG', nargs='+',
                        help=f'{of}, or stock ones as mmpretrain::folder/name.py')
    parser.add_argument('--checkpoint', metavar='FILE', nargs='+', default=[],
                        help='a file or web address for each config, in their order; '
                        f"'{NONE}' for a config without one{without}")
    add_weights_option(parser)


def check_model_options(args, **least):
    """Raise one line unless there is a checkpoint for each config, and options are large enough.

    Args:
        least: option -> the least that its value, or its smallest value, may be.
    """
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and (min(value) if isinstance(value, list) else value) < limit:
            raise UserError(f'--{name.replace("_", "-")} must be at least {limit}')
    if args.checkpoint and len(args.checkpoint) != len(args.configs):
        raise UserError(f'{len(args.configs)} config(s) and {len(args.checkpoint)} checkpoint(s): '
                        f"give one for each config, '{NONE}' for a config without")


def short_names(configs):
    """The configs' file names; one that occurs again gets a number."""
    names = []
    for config in configs:
        stem = name = Path(config.rpartition('::')[2]).stem
        number = 2
        while name in names:
            name, number = f'{stem} ({number})', number + 1
        names.append(name)
    return names


# --- models ---------------------------------------------------------------------------------

def build_trained(cfg, checkpoint, name, device):
    """The config's model with all of the checkpoint's weights."""
    from vmamba_mm.mm.hooks.strict_load import check_fits

    model = build_model(cfg)
    if hasattr(model, 'load_official') and model.is_official(name):
        model.towers.init_weights()  # which the authors' file lacks
        model.load_official(name)
    else:
        state, _ = check_fits(model, checkpoint, name)
        model.load_state_dict(state)
    return model.to(device).eval()


def drop_pretrained(node):
    """Remove what would load weights when a config's model is initialised."""
    if isinstance(node, dict):
        if isinstance(node.get('pretrained'), str | bool):
            node['pretrained'] = None if isinstance(node['pretrained'], str) else False
        init = node.get('init_cfg')
        loads = ('Pretrained', 'PretrainedInit')  # by name, and its class
        if isinstance(init, dict) and type_name(init) in loads:
            node['init_cfg'] = None
        elif isinstance(init, list | tuple):
            node['init_cfg'] = [i for i in init if type_name(i) not in loads]
        for value in node.values():
            drop_pretrained(value)
    elif isinstance(node, list | tuple):
        for value in node:
            drop_pretrained(value)


def build_random(cfg, seed):
    """The config's model on the CPU with random weights, the same for each call."""
    from mmengine.runner import set_random_seed

    drop_pretrained(cfg.model)
    set_random_seed(seed)
    model = build_model(cfg)
    model.init_weights()
    return model.eval()


def find_size(cfg, backbone):
    """The side of the images that a model is for, or None if that is not known."""
    size = getattr(backbone, 'img_size', None)
    if size is None:
        loader = cfg.get('test_dataloader') or {}
        for step in (loader.get('dataset') or {}).get('pipeline') or ():
            size = step.get('crop_size', size)
    return size[0] if isinstance(size, tuple | list) else size


# --- images ---------------------------------------------------------------------------------

def build_steps(cfg):
    """The transforms of the test pipeline but for the loading of annotations."""
    from mmengine.dataset import Compose

    dataset = next(d for _, d in datasets_of(cfg.test_dataloader.dataset, ''))

    def loads_annotations(step):
        name = type_name(step)
        return 'Load' in name and 'Annotations' in name

    return Compose([step for step in dataset.pipeline if not loads_annotations(step)]).transforms


def loads_pairs(cfg):
    """Whether the test pipeline takes two images, between which changes are found."""
    dataset = next(d for _, d in datasets_of(cfg.test_dataloader.dataset, ''))
    return any(type_name(step) in ('LoadImagePair', 'LoadMultipleRSImageFromFile')
               for step in dataset.pipeline)


def load_second(steps, first, second):
    """The later image of a pair as the loader of a pipeline reads it, (H, W, C)."""
    from vmamba_mm.mm.hooks.data import apply_steps

    # As the first of a pair, which is what a loader gives as the image.
    return apply_steps(steps[:1], {IMAGE.path_key: str(second), SECOND_KEY: str(first)})[1]


class Loader:
    """Loads images for a model: photographs by Pillow, all else by the config's test pipeline.

    Args:
        cfg, model: a config and its model.
        name: of the config, for errors.

    Raises:
        UserError: if there is no pipeline, and the model takes no photographs.
    """

    def __init__(self, cfg, model, name):
        from vmamba_mm.mm.flops import find_channels, reads_colours

        self.name, self.channels, self.steps = name, find_channels(cfg, model), None
        self.bgr = True
        if cfg.get('test_dataloader') is None:
            if self.channels != 3:
                raise UserError(f'{name}: the model takes images of {self.channels} channel(s), '
                                'and the config has no test_dataloader, whose pipeline loads them')
        elif self.channels != 3 or reads_colours(cfg) is False:
            from vmamba_mm.mm.pictures import reads_bgr

            self.steps = build_steps(cfg)
            self.bgr = reads_bgr(self.steps, getattr(model, 'data_preprocessor', None))

    def __call__(self, path):
        """(H, W, C): of a photograph uint8 in BGR, the order of mm* pipelines.

        Raises:
            UserError: if the file cannot be read, or has not as many channels as the model takes.
        """
        image = self._read(path)
        image = image if image.ndim == 3 else image[..., None]
        if image.shape[2] != self.channels:
            raise UserError(f'{path} has {image.shape[2]} channel(s) as the test pipeline of '
                            f'{self.name} loads it, and the model takes {self.channels}')
        return image

    def _read(self, path):
        from PIL import Image

        from vmamba_mm.mm.hooks.data import load_image

        if self.steps is not None:
            return load_image(self.steps, path)
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert('RGB'))[..., ::-1]
        except (OSError, SyntaxError) as err:
            raise UserError(f'{path} is corrupt, or no image') from err


def resize(image, size):
    """(H, W, C) to a tensor (C, size, size) by bicubic, uint8 or else fp32."""
    import torch
    from PIL import Image

    if image.dtype == np.uint8 and image.shape[2] == 3:
        resized = np.array(Image.fromarray(np.ascontiguousarray(image)).resize(
            (size, size), Image.Resampling.BICUBIC))
    else:
        resized = np.stack([np.asarray(Image.fromarray(channel).resize(
            (size, size), Image.Resampling.BICUBIC))
            for channel in np.moveaxis(image.astype(np.float32), -1, 0).copy()], -1)
    return torch.from_numpy(resized).permute(2, 0, 1)


def preprocess(model, image):
    """(1, C, H, W), as the model's preprocessor normalises an image on the model's device."""
    import torch

    inputs = model.data_preprocessor(dict(inputs=[image], data_samples=None))['inputs']
    inputs = inputs if isinstance(inputs, torch.Tensor) else torch.stack(list(inputs))
    if inputs.dim() != 4:
        raise UserError(f'the data preprocessor {type(model.data_preprocessor).__name__} makes no '
                        f'batch of images of a list of them, but {tuple(inputs.shape)}')
    if inputs.shape[2:] != image.shape[1:]:
        raise UserError(f'the data preprocessor turns images of {image.shape[1]}x{image.shape[2]} '
                        f'into {inputs.shape[2]}x{inputs.shape[3]}; choose that as --size')
    return inputs.float()
