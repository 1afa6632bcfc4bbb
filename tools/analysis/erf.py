"""Effective receptive fields: which input pixels the centre of the last feature map depends on.

For each config, before training (random weights, as the config initialises them) and after (from
a checkpoint): the gradient of the centre's activations, summed over channels, by the normalised
input; its absolute values, summed over colours and averaged over images. After RepLKNet (arXiv
2203.06717) and the ERF figure of VMamba (arXiv 2401.10166).

The table gives the area ratio r of the smallest centred square that holds more than t = 20, 30,
50, 99 % of all contribution: a large r at small t means that contributions are spread wide. The
rows 'log' count log10(1 + gradient) as RepLKNet does, which depends on the scale of the gradients;
the rows 'plain' count the gradient itself, and do not. The picture is on a logarithmic scale from
the largest contribution of each map down to 1/100,000 of it.
"""

import csv
import itertools
import json
import os
from pathlib import Path

import numpy as np

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.cli.images import list_images
from vmamba_mm.mm.inputs import (
    NONE,
    Loader,
    add_model_options,
    build_random,
    check_model_options,
    find_size,
    preprocess,
    resize,
    short_names,
)

EXAMPLES = """\
  python tools/analysis/erf.py configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py \\
      mmpretrain::resnet/resnet50_8xb32_in1k.py \\
      --checkpoint vmamba_mm://vmamba/tiny_s1l8 none --images data/imagenet/val
  python tools/analysis/erf.py CONFIG --images folder/ --size 192 --num-images 8 --device cpu"""

THRESHOLDS = (20, 30, 50, 99)  # per cent
BEFORE, AFTER = 'before training', 'after training'
SCORES = {'log': lambda erf: np.log10(1 + erf), 'plain': lambda erf: erf}
DARKEST = 1e-5  # of the largest contribution, in the picture


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    add_model_options(parser)
    parser.add_argument('--images', metavar='DIR', nargs='+', required=True,
                        help='folders of images, or image files')
    parser.add_argument('--num-images', type=int, default=50, metavar='N',
                        help='how many of them, spread evenly over their sorted list '
                        '(default: 50)')
    parser.add_argument('--size', type=int, default=1024, metavar='PIXELS',
                        help='side that the images are resized to; with a multiple of 64 the '
                        "centre of a map of stride 32 is the image's (default: 1024, as "
                        'published)')
    parser.add_argument('--gradient', choices=('absolute', 'positive'), default='absolute',
                        help='absolute values, or what is above 0, as in the public code of '
                        'RepLKNet and VMamba (default: absolute)')
    parser.add_argument('--seed', type=int, default=0, help='of the random weights (default: 0)')
    cli.add_device_option(parser)
    parser.add_argument('--out', default='work_dirs/erf', metavar='FOLDER',
                        help='for erf.png, .csv and .json (default: work_dirs/erf)')
    cli.add_common_options(parser, launcher=False)
    args = parser.parse_args()
    check_model_options(args, size=1, num_images=1)
    return args


# --- models ---------------------------------------------------------------------------------

def return_map(backbone):
    """Let a backbone of mmpretrain that returns tokens or their mean return its map instead."""
    if hasattr(backbone, 'out_type'):
        backbone.out_type = 'featmap'
    if hasattr(backbone, 'gap_before_final_norm'):  # ConvNeXt
        backbone.gap_before_final_norm = False


def as_map(features, backbone):
    """The last output as (B, C, H, W); of tokens (B, L, C) the first, for the class, are left out.

    Raises:
        UserError: if the output is neither a map nor the tokens of a square one.
    """
    while isinstance(features, tuple | list):
        features = features[-1]
    if features.dim() == 4:
        return features
    if features.dim() == 3:
        if features.shape[1] == getattr(backbone, 'embed_dims', None) != features.shape[2]:
            features = features.transpose(1, 2)  # mixers
        for extra in (getattr(backbone, 'num_extra_tokens', 0), 1):
            side = round((features.shape[1] - extra) ** 0.5)
            if side > 0 and side * side == features.shape[1] - extra:
                return features[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    raise UserError(f'the backbone {type(backbone).__name__} returns no feature map but '
                    f'{tuple(features.shape)}')


# --- the measure ----------------------------------------------------------------------------

def contributions(backbone, x, gradient='absolute'):
    """The contribution of each input pixel to the centre of the last feature map.

    The activations are summed after ReLU, as in RepLKNet's code: the channels of a map behind a
    LayerNorm sum to a constant, whose gradient is zero.

    Args:
        backbone: (B, C, H, W) -> map or tokens, see :func:`as_map`.
        x: (B, C, H, W), normalised.
        gradient: 'absolute' or 'positive' (negative ones count nothing).

    Returns:
        (H, W) float64 array, the sum over images and colours.
    """
    import torch

    x = x.detach().requires_grad_()
    features = as_map(backbone(x), backbone)
    centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    grad, = torch.autograd.grad(centre.relu().sum(), x)
    grad = grad.abs() if gradient == 'absolute' else grad.relu()
    return grad.sum((0, 1)).double().cpu().numpy()


def measure(model, paths, args, name, native, load):
    """The mean of :func:`contributions` over images: (size, size) float64.

    Raises:
        UserError: if the backbone does not take images of this size.
    """
    import torch
    from mmengine.utils import track_iter_progress

    return_map(model.backbone)
    total = np.zeros((args.size, args.size))
    try:
        for path in track_iter_progress(paths):
            x = preprocess(model, resize(load(path), args.size))
            total += contributions(model.backbone, x, args.gradient)
    except torch.OutOfMemoryError as err:
        raise UserError(f'{name}: the GPU memory is used up; choose a smaller --size') from err
    except (AssertionError, RuntimeError, ValueError) as err:
        if isinstance(err, UserError) or native == args.size:
            raise
        hint = f'; it is for {native}x{native}, try --size {native}' if native else ''
        raise UserError(f'{name}: the backbone {type(model.backbone).__name__} does not take '
                        f'images of {args.size}x{args.size}: {err}{hint}') from err
    finally:
        print(flush=True)  # ends the line of the progress bar
    if not np.isfinite(total).all() or not total.any():
        raise UserError(f'{name}: the gradients by the input are not finite, or all zero')
    return total / len(paths)


def area_ratio(scores, threshold):
    """The smallest centred square that holds more than a share of all contribution.

    The centre is pixel (H // 2, W // 2), so that a side is odd unless it is the whole map's, as
    in RepLKNet's code.

    Args:
        scores: (H, H), not negative.
        threshold: the share, from 0 to below 1.

    Returns:
        Its side in pixels, and its area divided by that of the input.
    """
    size = len(scores)
    wanted = threshold * scores.sum()
    for i in range(size // 2 + 1):
        inside = scores[size // 2 - i:size // 2 + i + 1, size // 2 - i:size // 2 + i + 1]
        if inside.sum() > wanted:
            break
    side = len(inside)
    return side, (side / size) ** 2


def tabulate(erfs):
    """A row for each model, state and score; ``erfs``: {(model, state): (size, size)}."""
    rows = []
    for (name, state), erf in erfs.items():
        for score, of in SCORES.items():
            areas = {t: area_ratio(of(erf), t / 100) for t in THRESHOLDS}
            rows.append({'model': name, 'state': state, 'score': score}
                        | {f'r{t}': ratio for t, (_, ratio) in areas.items()}
                        | {f'side{t}': side for t, (side, _) in areas.items()})
    return rows


# --- output ---------------------------------------------------------------------------------

def show(rows):
    width = max(len('model'), *(len(row['model']) for row in rows))
    print(f'\n{"model":{width}}  {"state":15}  score' + ''.join(f'{f"r {t} %":>9}'
                                                                for t in THRESHOLDS))
    for row in rows:
        print(f'{row["model"]:{width}}  {row["state"]:15}  {row["score"]:5}'
              + ''.join(f'{100 * row[f"r{t}"]:7.2f} %' for t in THRESHOLDS))


def draw(erfs, rows, title, path):
    """Draw the fields before training beside those after it for one model, above them for several,
    on one logarithmic scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from vmamba_mm.mm.text import drawable

    names = list(dict.fromkeys(name for name, _ in erfs))
    shown = {name: drawable(name) for name in names}
    states = [s for s in (BEFORE, AFTER) if any(state == s for _, state in erfs)]
    shape = (1, len(states)) if len(names) == 1 else (len(states), len(names))
    figure = Figure(figsize=(2.9 * shape[1] + 1.5, 3.8 * shape[0] + 0.4), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(*shape, squeeze=False)
    ratios = {(row['model'], row['state']): row for row in rows if row['score'] == 'log'}
    for ax, (state, name) in zip(axes.flat, itertools.product(states, names), strict=True):
        ax.set(xticks=[], yticks=[])
        # Names of configs are too long for one line; behind '_' is the recipe.
        ax.set_title(shown[name].replace('_', '\n_', 1) + f'\n{state}', fontsize=9)
        if (name, state) not in erfs:
            ax.text(0.5, 0.5, 'no checkpoint', ha='center', va='center')
            ax.set(aspect='equal')
            continue
        share = erfs[name, state] / erfs[name, state].max()
        drawn = ax.imshow(np.maximum(share, DARKEST), cmap='viridis', norm=LogNorm(DARKEST, 1))
        percentages = ', '.join(f'{100 * ratios[name, state][f"r{t}"]:.3g}' for t in THRESHOLDS)
        ax.set_xlabel(f'r = {percentages} %', fontsize=9)
    figure.colorbar(drawn, ax=axes, label='contribution / largest contribution', extend='min',
                    shrink=0.8)
    figure.suptitle(f'{title}\nr at {", ".join(map(str, THRESHOLDS))} % of log10(1 + gradient)',
                    fontsize=9)
    figure.savefig(path, dpi=130)


def main():
    args = parse_args()
    configs = [cli.load_config(path, args.cfg_options) for path in args.configs]
    import logging

    import torch
    from mmengine.logging import MMLogger

    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.mm.hooks.strict_load import check_fits

    MMLogger.get_current_instance().setLevel(logging.ERROR)  # a line for each parameter
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # for the next line, on a GPU
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = cli.choose_device(args.device)
    paths = list_images(args.images)
    count = min(args.num_images, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    names = short_names(args.configs)
    erfs, files = {}, args.checkpoint or [NONE] * len(names)
    for cfg, name, file in zip(configs, names, files, strict=True):
        model = build_random(cfg, args.seed)
        if not isinstance(getattr(model, 'backbone', None), torch.nn.Module):
            raise UserError(f'{name}: the model {type(model).__name__} has no backbone')
        native, load = find_size(cfg, model.backbone), Loader(cfg, model, name)
        if file != NONE:  # before the first run, which takes long
            state, _ = check_fits(model, read_checkpoint(
                file, args.weights, likely=cli.families_of(cfg)), file)
        print(f'{name}, {BEFORE}')
        erfs[name, BEFORE] = measure(model.to(device), paths, args, name, native, load)
        if file != NONE:
            print(f'{name}, {AFTER}')
            model.load_state_dict(state)
            erfs[name, AFTER] = measure(model, paths, args, name, native, load)

    rows = tabulate(erfs)
    show(rows)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'erf.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    setting = dict(
        size=args.size, images=[str(p) for p in paths], gradient=args.gradient, seed=args.seed,
        device=torch.cuda.get_device_name(device) if device.startswith('cuda') else device,
        torch=torch.__version__, configs=dict(zip(names, args.configs, strict=True)),
        checkpoints=dict(zip(names, files, strict=True)))
    (out / 'erf.json').write_text(json.dumps(dict(setting=setting, rows=rows), indent=2) + '\n')
    draw(erfs, rows, f'Effective receptive fields, {args.size}x{args.size}, {count} image(s)',
         out / 'erf.png')
    print(f'wrote {out}/erf.png, .csv and .json')


if __name__ == '__main__':
    cli.run(main)
