"""Convert a VMamba checkpoint to a small, clean file: weights and a few facts about them."""

import io
import json
import os
from pathlib import Path

import _cli

EXAMPLES = """\
  python tools/convert_checkpoint.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba-tiny-s1l8.pth
  python tools/convert_checkpoint.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba.safetensors
  python tools/convert_checkpoint.py work_dirs/NAME/epoch_300.pth official.pth --to official"""


def parse_args():
    parser = _cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('source', metavar='SRC',
                        help='a checkpoint file or web address, official or ours')
    parser.add_argument('target', metavar='DST', help='the file to write')
    parser.add_argument('--to', choices=('mm', 'official', 'safetensors'),
                        help="mm: names of this package and OpenMMLab, {'meta', 'state_dict'}; "
                        'official: names of the released files; safetensors: names as mm '
                        '(default: safetensors if DST ends so, else mm)')
    _cli.add_weights_option(parser)
    parser.add_argument('--traceback', action='store_true', help=_cli.argparse.SUPPRESS)
    return parser.parse_args()


def check_complete(state, arch, source):
    """The backbone must be all of its architecture: converting half a file would hide that."""
    import torch

    from vmamba_mm.checkpoint import differences, explain_differences
    from vmamba_mm.models import VMamba

    found = {k: v for k, v in state.items() if k.startswith('backbone.')}
    norms = [i for i in range(4) if f'backbone.norm{i}.weight' in found]
    with torch.device('meta'):
        model = VMamba(arch, out_indices=norms or (3,),
                       in_channels=next(v for v in found.values() if v.dim() == 4).shape[1])
    expected = {f'backbone.{k}': v for k, v in model.state_dict().items()
                if norms or not k.startswith('norm3.')}
    wrong = differences(expected, found)
    if wrong:
        raise _cli.UserError(explain_differences(wrong, expected, found, source))


def make_meta(checkpoint, source, path):
    """What is worth keeping: plain values without anybody's paths or settings."""
    from vmamba_mm import __version__
    from vmamba_mm.files import sha256_of

    meta = checkpoint['meta']
    kept = {k: meta[k] for k in ('arch', 'task', 'weights', 'epoch', 'iter', 'dataset_meta')
            if k in meta}
    return dict(kept, source=os.path.basename(str(source)), source_sha256=sha256_of(path),
                vmamba_mm_version=__version__)


def save(state, meta, target, to):
    import torch

    from vmamba_mm.atomic import write_atomic
    from vmamba_mm.checkpoint import to_official

    # Copies, so that no larger storage around a tensor is saved with it.
    state = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    buffer = io.BytesIO()
    if to == 'safetensors':
        from safetensors.torch import save as to_bytes
        buffer.write(to_bytes(state, metadata=dict(format='pt', meta=json.dumps(meta))))
    elif to == 'official':
        state = to_official(state)
        dense = meta['task'] in ('det', 'seg')
        torch.save(dict(meta=meta, state_dict=state) if dense else dict(model=state), buffer)
    else:
        torch.save(dict(meta=meta, state_dict=state), buffer)
    write_atomic(buffer.getbuffer(), target)


def main():
    args = parse_args()
    to = args.to or ('safetensors' if args.target.endswith('.safetensors') else 'mm')
    if (to == 'safetensors') != args.target.endswith('.safetensors'):
        raise _cli.UserError(f'--to {to} and the name {args.target} do not agree: files of '
                             'safetensors, and no others, end with .safetensors')
    if Path(args.target).is_dir():
        raise _cli.UserError(f'{args.target} is a folder: name the file to write')
    from vmamba_mm.checkpoint import is_vmamba
    from vmamba_mm.files import fetch, read_checkpoint

    path = fetch(args.source)
    checkpoint = read_checkpoint(path, args.weights)
    state = checkpoint.get('state_dict', checkpoint)
    if not is_vmamba(state) or 'arch' not in checkpoint['meta']:
        raise _cli.UserError(f'{args.source} holds no VMamba')
    arch = checkpoint['meta']['arch']
    check_complete(state, arch, args.source)
    meta = make_meta(checkpoint, args.source, path)
    save(state, meta, args.target, to)
    count = sum(v.numel() for v in state.values())
    print(f'{args.source}: {arch if isinstance(arch, str) else "VMamba of its own"}, task '
          f'{meta["task"]}, {len(state)} tensors, {count:,} values'
          + (f', weights of {meta["weights"]!r}' if 'weights' in meta else ''))
    print(f'Written: {args.target} ({os.path.getsize(args.target) / 2**20:.1f} MiB, '
          f'{os.path.getsize(path) / 2**20:.1f} MiB before)')


if __name__ == '__main__':
    _cli.run(main)
