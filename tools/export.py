"""Write a trained model as a file of another runtime, and check the file by running it.

Of a classifier and a segmentor the whole network is written, up to the logits, and of a detector
its backbone and neck. Images go in as the data preprocessor of the config gives them. The file is
run on images of several sizes and compared with the model; it ends with an error if one differs.
"""

from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.inputs import NONE, build_random, build_trained, find_size

EXAMPLES = """\
  python tools/export.py CONFIG CHECKPOINT --to onnx
  python tools/export.py CONFIG CHECKPOINT --to openvino --size 512 512
  python tools/export.py CONFIG CHECKPOINT --to pt2 --dynamic --out model.pt2
  python tools/export.py timm::vmamba_tiny_s1l8 weights.pth --to onnx
  python tools/export.py CONFIG none --to onnx   (random weights, to measure)"""

TIMM = 'timm::'
SIZE = 224  # where a config does not say


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', metavar='CONFIG',
                        help='a config file, a stock one as mmdet::folder/name.py, or a model of '
                        f'timm as {TIMM}NAME')
    parser.add_argument('checkpoint', metavar='CHECKPOINT',
                        help='a checkpoint file or web address, official or ours; none for random '
                        'weights')
    parser.add_argument('--to', required=True, metavar='TARGET',
                        help='onnx, openvino, pt2 (AOTInductor) or tensorrt')
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'),
                       help='height and width of the images (default: as the config tests)')
    sizes.add_argument('--dynamic', action='store_true', help='images of any size')
    parser.add_argument('--dtype', choices=('fp32', 'fp16'), default='fp32',
                        help='of weights and images (default: fp32)')
    parser.add_argument('--out', metavar='FILE',
                        help="the file (default: the config's name, here)")
    cli.add_weights_option(parser)
    cli.add_common_options(parser, launcher=False)
    return parser.parse_args()


def load_timm(name, checkpoint):
    import timm

    import vmamba_mm.timm  # noqa: F401 (its import adds the names)

    if not timm.is_model(name):
        raise UserError(f'timm has no model {name!r}; timm.list_models() lists them')
    model = timm.create_model(name)
    if checkpoint != NONE:
        model.load_pretrained(checkpoint)
    return model, None


def load_model(args):
    """The model, and the side of the images that it is for, or None."""
    if args.config.startswith(TIMM):
        return load_timm(args.config.removeprefix(TIMM), args.checkpoint)
    cfg = cli.load_config(args.config, args.cfg_options)
    if args.checkpoint == NONE:
        model = build_random(cfg, 0)
    else:
        from vmamba_mm.checkpoints.files import read_checkpoint

        checkpoint = read_checkpoint(args.checkpoint, args.weights, likely=cli.families_of(cfg))
        model = build_trained(cfg, checkpoint, args.checkpoint, 'cpu')
    return model, find_size(cfg, getattr(model, 'backbone', model))


def main():
    args = parse_args()
    from vmamba_mm.integrations.export import TARGETS, export_model

    if args.to not in TARGETS:
        raise UserError(f'--to {args.to} does not exist; choose one of {", ".join(TARGETS)}')
    TARGETS[args.to].check(args.to)
    if args.size and min(args.size) < 1:
        raise UserError('--size must be at least 1 pixel a side')
    model, side = load_model(args)
    name = args.config.removeprefix(TIMM).rpartition('::')[2]
    out = Path(args.out or Path(name).stem + TARGETS[args.to].suffix)
    size = args.size or (side or SIZE,) * 2
    report = export_model(model, args.to, out, size=size, is_dynamic=args.dynamic,
                          dtype=args.dtype)
    taken = 'images of any size' if args.dynamic else f'images of {size[0]} x {size[1]}'
    print(f'{out}: {args.to}, {args.dtype}, {taken}')
    for line in report.lines():
        print(f'  {line}')
    if not report.is_right:
        raise UserError(f'{out} does not calculate what the model does: do not use it')


if __name__ == '__main__':
    cli.run(main)
