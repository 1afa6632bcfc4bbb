"""Convert a VMamba checkpoint to a small, clean file: weights and a few facts about them."""

import io
import json
import os
from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/convert_checkpoint.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba-tiny-s1l8.pth
  python tools/convert_checkpoint.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba.safetensors
  python tools/convert_checkpoint.py work_dirs/NAME/epoch_300.pth official.pth --to official
  python tools/convert_checkpoint.py lightning.ckpt vmamba.pth"""
SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.safetensors')


def parse_args():
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument('source', metavar='SRC',
                        help='a checkpoint file, folder or web address: official, ours, or of '
                        'another trainer')
    parser.add_argument('target', metavar='DST',
                        help=f'the file to write, ending with {", ".join(SUFFIXES)}')
    parser.add_argument('--to', choices=('mm', 'official', 'safetensors'),
                        help="mm: names of this package and OpenMMLab, {'meta', 'state_dict'}; "
                        'official: names of the released files; safetensors: names as mm '
                        '(default: safetensors if DST ends so, else mm)')
    parser.add_argument('--force', action='store_true',
                        help='write over DST if it exists (never over SRC)')
    cli.add_weights_option(parser)
    cli.add_traceback_option(parser)
    return parser.parse_args()


def check_complete(state, arch, source):
    """The backbone must be all of its architecture: converting half a file would hide that."""
    import torch

    from vmamba_mm.checkpoints.names import differences, explain_differences
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
        raise UserError(explain_differences(wrong, expected, found, source))


def check_target(target, to, force):
    """Before any work: a name that says what the file is, and nothing lost that is there."""
    path = Path(target)
    if path.is_dir():
        raise UserError(f'{target} is a folder: name the file to write')
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'{target} does not end like a file of weights: name it with one '
                        f'of {", ".join(SUFFIXES)}')
    if (to == 'safetensors') != (path.suffix.lower() == '.safetensors'):
        raise UserError(f'--to {to} and the name {target} do not agree: files of '
                        'safetensors, and no others, end with .safetensors')
    if os.path.lexists(path) and not force:
        raise UserError(f'{target} exists: choose another name, or write over it with '
                        '--force')


def refuse_own_input(source, files, target):
    """Whatever links or relative names the two are called by."""
    if not os.path.exists(target):
        return
    for file in files:
        if file.exists() and os.path.samefile(file, target):
            raise UserError(f'{target} is the input itself ({source}), which would be lost: '
                            'choose another name')


def find_left_out(content, key, held, state):
    """What of the input is not in the weights to write, for the report."""
    known = ('meta', 'epoch', key.partition('.')[0])
    left = [] if key == '' else [k for k in content if k not in known]
    kept = {v.untyped_storage().data_ptr() for v in state.values()}
    return left + [k for k, v in held.items() if not hasattr(v, 'untyped_storage')
                   or v.untyped_storage().data_ptr() not in kept]


def make_meta(checkpoint, source, path):
    """What is worth keeping: plain values without anybody's paths or settings."""
    from vmamba_mm import __version__
    from vmamba_mm.checkpoints.files import sha256_of

    meta = checkpoint['meta']
    kept = {k: meta[k] for k in ('arch', 'task', 'weights', 'epoch', 'iter', 'dataset_meta')
            if k in meta}
    if path.is_file():
        kept['source_sha256'] = sha256_of(path)
    return dict(kept, source=os.path.basename(str(source).rstrip('/')),
                vmamba_mm_version=__version__)


def save(state, meta, target, to):
    import torch

    from vmamba_mm.atomic import write_atomic
    from vmamba_mm.checkpoints.names import to_official

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
    is_safetensors = args.target.lower().endswith('.safetensors')
    to = args.to or ('safetensors' if is_safetensors else 'mm')
    if '://' not in args.source:
        refuse_own_input(args.source, [Path(args.source).expanduser()], args.target)
    check_target(args.target, to, args.force)
    from vmamba_mm.checkpoints.files import choose_weights, fetch, select_weights
    from vmamba_mm.checkpoints.formats import list_files, read_content
    from vmamba_mm.checkpoints.names import backbone_prefixes, describe_places

    path = fetch(args.source)
    refuse_own_input(args.source, list_files(path), args.target)
    content = read_content(path)
    checkpoint = select_weights(content, args.weights, path)
    state = checkpoint.get('state_dict', checkpoint)
    if 'arch' not in (checkpoint.get('meta') or {}):
        if backbone_prefixes(state):
            raise UserError(f'{args.source} holds {describe_places(state)}: convert takes one '
                            "VMamba under 'backbone.', with its heads beside it, or alone; "
                            'save that one alone')
        raise UserError(f'{args.source} holds no VMamba')
    key, held, _ = choose_weights(content, args.weights, path)
    arch = checkpoint['meta']['arch']
    check_complete(state, arch, args.source)
    meta = make_meta(checkpoint, args.source, path)
    save(state, meta, args.target, to)
    count = sum(v.numel() for v in state.values())
    print(f'{args.source}: {arch if isinstance(arch, str) else "VMamba of its own"}, task '
          f'{meta["task"]}, {len(state)} tensors, {count:,} values'
          + (f', weights of {meta["weights"]!r}' if 'weights' in meta else ''))
    if left_out := find_left_out(content, key, held, state):
        print(f'Left out: {", ".join(map(str, left_out[:12]))}'
              + (f' and {len(left_out) - 12} more' if len(left_out) > 12 else ''))
    print(f'Written: {args.target} ({os.path.getsize(args.target) / 2**20:.1f} MiB, '
          f'{sum(p.stat().st_size for p in list_files(path)) / 2**20:.1f} MiB before)')


if __name__ == '__main__':
    cli.run(main)
