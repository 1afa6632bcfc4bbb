"""Activation maps of SS2D: which pixels the scan's output at one pixel, the query, is made of.

Along each of the four routes S6 is attention with Q = C, K = B and V = delta u, limited to the
pixels i that the route has passed before the query t (arXiv 2401.10166, on the relationship between
SS2D and self-attention). For channel d, with n over the states,

    y_t = sum_(i <= t) a_ti delta_i u_i + D u_t
    a_ti = sum_n C_tn exp(A_n (delta_(i+1) + ... + delta_t)) B_in

--map attention shows |a_ti|, in the paper (Q * w) (K / w)^T with the decay w; contribution shows
|a_ti delta_i u_i|; both averaged over the channels d. qk shows |sum_n C_tn B_in|, without the
decay. 'all four' is the sum of the routes. Colours are relative to the largest value of each map,
on a square-root scale; below it stand its value and the share of the route in the sum. Where a
route has not been, the image stays grey.

The maps are of single blocks, not of the network, at the resolution of the block: a pixel of it is
4, 8, 16 or 32 pixels of the image, by stage.
"""

import json
from pathlib import Path

import numpy as np

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.cli import images as image_files
from vmamba_mm.mm.cli.images import Failures, Outputs, sign
from vmamba_mm.mm.inputs import Loader, build_trained, find_size, preprocess, resize

EXAMPLES = """\
  python tools/analysis/activation_maps.py configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py \\
      --checkpoint vmamba_mm://vmamba/tiny_s1l8 photo.jpg --pixel 120 200
  python tools/analysis/activation_maps.py CONFIG --checkpoint FILE folder/ --size 448 \\
      --block 1.1 2.0 2.7 --map contribution"""

MAPS = {'attention': r'attention, $|(Q \odot w)(K / w)^T|$, mean over channels',
        'contribution': r'contribution, $|(Q \odot w)(K / w)^T V|$, mean over channels',
        'qk': r'attention without decay, $|Q K^T|$'}


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG', help='of a model with a VMamba backbone')
    parser.add_argument('--checkpoint', metavar='FILE', required=True,
                        help='a checkpoint file or web address, official or ours')
    cli.add_weights_option(parser)
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='image files or folders of them')
    parser.add_argument('--pixel', nargs=2, default=('0.5', '0.5'), metavar=('Y', 'X'),
                        help='the query: row and column in the image file, or shares of its height '
                        'and width, with a point (default: 0.5 0.5)')
    parser.add_argument('--block', nargs='+', default=[], metavar='STAGE.INDEX',
                        help='blocks, both counted from 0 (default: the last of each of the first '
                        'three stages)')
    parser.add_argument('--map', choices=tuple(MAPS), default='attention',
                        help='what to show, see above (default: attention)')
    parser.add_argument('--size', type=int, metavar='PIXELS',
                        help='side that the images are resized to (default: that of the test '
                        'pipeline, or 224)')
    image_files.add_channels_option(parser)
    cli.add_device_option(parser)
    parser.add_argument('--out', default='work_dirs/activation_maps', metavar='FOLDER',
                        help='for a picture and a .npz of the maps for each image, and '
                        'activation_maps.json (default: work_dirs/activation_maps)')
    cli.add_common_options(parser, launcher=False)
    args = parser.parse_args()
    if args.size is not None and args.size < 1:
        raise UserError('--size must be at least 1')
    image_files.check_channels_option(args)
    return args


# --- what the user chose --------------------------------------------------------------------

def find_blocks(backbone, names):
    """{'stage.index': its SS2D}, of those named or by default."""
    last = backbone.out_indices[-1]  # the backbone stops there
    if not names:
        names = [f'{i}.{backbone.depths[i] - 1}' for i in range(min(last, 2) + 1)]
    known = {f'{i}.{j}': block.ssm for i, stage in enumerate(backbone.stages[:last + 1])
             for j, block in enumerate(stage.blocks)}
    for name in names:
        if name not in known:
            counts = ', '.join(f'{i}.0 to {i}.{n - 1}' if n > 1 else f'{i}.0'
                               for i, n in enumerate(backbone.depths[:last + 1]))
            raise UserError(f'--block {name}: there is no such block; choose of {counts}')
    return {name: known[name] for name in dict.fromkeys(names)}


def find_position(pixel, path, sides=None):
    """The query as shares (y, x) of an image's height and width, in the middle of a whole pixel.

    ``sides``: height and width, where Pillow does not read the image.
    """
    from PIL import Image

    if sides is None:
        with Image.open(path) as image:
            sides = image.height, image.width
    shares = []
    for text, side in zip(pixel, sides, strict=True):
        try:
            value = float(text) if '.' in text else (int(text) + 0.5) / side
        except ValueError:
            raise UserError(f'--pixel {" ".join(pixel)}: {text!r} is neither a whole number of '
                            'pixels nor a share such as 0.5') from None
        if not 0 <= value < 1:
            raise UserError(f'--pixel {" ".join(pixel)} is outside {path}, whose height and width '
                            f'are {sides[0]} and {sides[1]}; as shares both are from 0.0 to below '
                            '1.0')
        shares.append(value)
    return tuple(shares)


# --- the measure ----------------------------------------------------------------------------

def find_maps(inputs, pixel, kind):
    """The map of each route, (K, H, W) float32 array with NaN where the route has not been.

    Args:
        inputs: of the scan, of one image.
        pixel: the query (row, column) in the scan's map.
        kind: 'attention', 'contribution' or 'qk'.
    """
    import torch

    from vmamba_mm.ops import ss2d_attention

    attention = ss2d_attention(*inputs, pixel)
    if kind == 'qk':
        maps_KHW = attention.qk[0].abs()
    else:
        values = attention.values[0] if kind == 'contribution' else 1
        maps_KHW = (attention.weights[0] * values).abs().mean(1)
    if not maps_KHW.isfinite().all() or not maps_KHW.any():
        raise UserError('the maps are not finite, or all zero')
    return maps_KHW.masked_fill(~attention.seen, torch.nan).cpu().numpy()


def measure(model, image, position, blocks, kind):
    """{block: (maps, query)}; the position of the query is in shares of height and width."""
    import torch

    from vmamba_mm.layers import record_scan_inputs

    with torch.no_grad(), record_scan_inputs(list(blocks.values())) as inputs:
        model.backbone(preprocess(model, image))
    maps_of = {}
    for name, module in blocks.items():
        height, width = inputs[module][0].shape[2:]
        query = int(position[0] * height), int(position[1] * width)
        maps_of[name] = find_maps(inputs[module], query, kind), query
    return maps_of


def find_shares(maps):
    """Each route's part of the sum of all."""
    sums = np.nansum(maps, (1, 2), dtype=np.float64)
    return (sums / sums.sum()).tolist()


# --- output ---------------------------------------------------------------------------------

def draw(maps_of, image, position, title, path):
    """A row for each block: the image with the query, the four routes over it, and their sum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    from vmamba_mm.ops.orders.reference import ROUTES

    side = image.shape[0]
    grey = 60 + 0.5 * image.mean(-1)  # little contrast: shades under a colour change it
    figure = Figure(figsize=(13.2, 2.3 * len(maps_of) + 0.4), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(maps_of), 2 + len(ROUTES), squeeze=False)
    for row, (block, (maps, query)) in zip(axes, maps_of.items(), strict=True):
        total = np.nansum(maps, 0)
        centre = [(q + 0.5) / n for q, n in zip(query, total.shape, strict=True)]
        row[0].imshow(image)
        row[0].set_ylabel(f'block {block}, {total.shape[0]}x{total.shape[1]}', fontsize=9)
        shares = [f', share {100 * share:.2g} %' for share in find_shares(maps)]
        for ax, values, share in zip(row[1:], (*maps, total), (*shares, ''), strict=True):
            ax.imshow(grey, cmap='gray', vmin=0, vmax=255)
            largest = np.nanmax(values)
            drawn = ax.imshow(values / (largest or 1), cmap='viridis', alpha=0.8,
                              norm=PowerNorm(0.5, 0, 1),  # single peaks would hide the rest
                              extent=(-0.5, side - 0.5, side - 0.5, -0.5))
            ax.set_xlabel(f'max {largest:.2g}{share}', fontsize=9)
        for ax, (y, x) in zip(row, [position] + [centre] * (len(row) - 1), strict=True):
            ax.set(xticks=[], yticks=[])
            for colour, width in (('white', 3), ('red', 1.5)):  # an open ring: its inside counts
                ax.plot(x * side - 0.5, y * side - 0.5, 'o', markersize=9, markeredgecolor=colour,
                        markerfacecolor='none', markeredgewidth=width, clip_on=False)
    for ax, name in zip(axes[0], ('query', *ROUTES, 'all four'), strict=True):
        ax.set_title(name, fontsize=10)
    figure.colorbar(drawn, ax=axes, label='value / largest', shrink=0.8,
                    ticks=(0, 0.01, 0.1, 0.3, 0.6, 1), format='%g',
                    aspect=15 * len(maps_of), pad=0.01)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    images = image_files.list_images(args.images)
    import logging

    from mmengine.logging import MMLogger
    from mmengine.utils import track_iter_progress

    from vmamba_mm.checkpoints.files import read_checkpoint
    from vmamba_mm.mm.pictures import Pictures
    from vmamba_mm.mm.text import drawable
    from vmamba_mm.models import VMamba
    from vmamba_mm.ops.orders.reference import ROUTES

    MMLogger.get_current_instance().setLevel(logging.ERROR)
    model = build_trained(cfg, read_checkpoint(args.checkpoint, args.weights), args.checkpoint,
                        cli.choose_device(args.device))
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, VMamba):
        raise UserError(f'the backbone of {args.config} is {type(backbone).__name__}, which has no '
                        'SS2D; give a config with vmamba_mm.VMamba')
    if backbone.arch.get('core', 's6') != 's6':
        raise UserError(f"the backbone's arch has core={backbone.arch['core']!r}, whose blocks "
                        "have no SS2D; the maps of this tool are those of core='s6'")
    if backbone.arch['scan'] != 'cross':
        raise UserError(f"the backbone's arch has scan={backbone.arch['scan']!r}; the routes that "
                        "this tool knows are those of scan='cross'")
    blocks = find_blocks(backbone, args.block)
    size = args.size or find_size(cfg, backbone) or 224

    load = Loader(cfg, model, args.config)
    to_picture = Pictures(args.channels, load.bgr)

    out = Path(args.out)
    outputs, failures, report = Outputs(out), Failures(len(images), 'shown'), {}
    for path in track_iter_progress(images):
        try:
            loaded = load(path)
        except UserError as err:
            failures.add(path, err)
            continue
        image, position = resize(loaded, size), find_position(args.pixel, path, loaded.shape[:2])
        maps_of = measure(model, image, position, blocks, args.map)
        picture = outputs.choose(path)
        draw(maps_of, to_picture(image.permute(1, 2, 0).numpy()), position,
             drawable(f'{path.name}, {size}x{size}: ') + MAPS[args.map], picture)
        sign(picture, path)
        np.savez_compressed(picture.with_suffix('.npz'),
                            **{b: maps for b, (maps, _) in maps_of.items()})
        report[picture.stem] = dict(image=str(path), position=position, blocks={
            block: dict(query=query, shares=find_shares(maps))
            for block, (maps, query) in maps_of.items()})
    print()
    setting = dict(config=args.config, checkpoint=args.checkpoint, map=args.map, size=size,
                   routes=ROUTES)
    (out / 'activation_maps.json').write_text(
        json.dumps(dict(setting=setting, images=report), indent=2) + '\n')
    print(f'wrote {len(report)} picture(s), a .npz for each, and {out}/activation_maps.json')
    failures.finish()


if __name__ == '__main__':
    cli.run(main)
