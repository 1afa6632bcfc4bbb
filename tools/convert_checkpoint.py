"""Convert a checkpoint to a small, clean file: weights and a few facts about them."""

import io
import json
import os
from pathlib import Path

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli

EXAMPLES = """\
  python tools/convert_checkpoint.py vmamba_mm://vmamba/tiny_s1l8 vmamba-tiny-s1l8.pth
  python tools/convert_checkpoint.py vmamba_mm://vmamba/tiny_s1l8 vmamba.safetensors
  python tools/convert_checkpoint.py work_dirs/NAME/epoch_300.pth official.pth --to official
  python tools/convert_checkpoint.py lightning.ckpt vmamba.pth
  python tools/convert_checkpoint.py videomamba_t16_in1k_res224.pth tiny.pth --family videomamba"""
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
    parser.add_argument('--family', metavar='NAME',
                        help='the family of models that SRC is of, such as vmamba (default: the '
                        'one whose weights have exactly these names)')
    cli.add_weights_option(parser)
    cli.add_traceback_option(parser)
    return parser.parse_args()


def check_complete(state, arch, family, source):
    """The backbone must be all of its architecture: converting half a file would hide that."""
    import torch

    from vmamba_mm.checkpoints.compare import differences, explain_differences
    from vmamba_mm.checkpoints.prefixes import inside
    from vmamba_mm.models.pretrained import OUTPUT_NORM
    from vmamba_mm.registry import MODELS

    backbone = inside(state, 'backbone.')
    name = family.model_of(backbone)
    model, has_norms = MODELS.get(name), any(map(OUTPUT_NORM.match, backbone))
    try:
        arguments = model.arguments_of(backbone)
    except KeyError as err:
        raise UserError(f'{source}: the weights are named like those of a {name}, but lack '
                        f'{err}') from err
    with torch.device('meta'):
        expected = model(arch=arch, **arguments).state_dict()
    expected = {k: v for k, v in expected.items() if has_norms or not OUTPUT_NORM.match(k)}
    wrong = differences(expected, backbone)
    if wrong:
        wrong, expected, backbone = ({f'backbone.{k}': v for k, v in of.items()}
                                     for of in (wrong, expected, backbone))
        raise UserError(explain_differences(wrong, expected, backbone, source))


def find_family(name, content, path, source, weights):
    """The family of this name, or the one whose model the file holds, at least in part."""
    from vmamba_mm.checkpoints.files import choose_weights, select_weights, told_family
    from vmamba_mm.checkpoints.prefixes import find_models
    from vmamba_mm.families import FAMILIES, SeveralFamilies

    if name is not None and name not in FAMILIES:
        raise UserError(f'--family {name} does not exist; choose one of '
                        f'{", ".join(sorted(FAMILIES))}')
    named = [FAMILIES[name]] if name else []
    is_dict = isinstance(content, dict)
    try:
        for family in (named or (None, *FAMILIES.values())) if is_dict else ():  # exact ones first
            if chosen := choose_weights(content, weights, path, family):
                return find_models(chosen[1], family)[0].family
    except SeveralFamilies as err:
        if (told := told_family(source, content)) in err.families:
            return told
        raise UserError(f'{path}: {err}') from err
    select_weights(content, weights, path)  # which says so if it is no file of weights at all
    models = ' or '.join(f.model for f in named or FAMILIES.values())
    raise UserError(f'{path} holds no {models}')


def check_target(target, to, force):
    """Refuse, before any work, a name that does not say what the file is, or one that exists."""
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
    """Refuse a target that is the input, by whatever links or relative names they are called."""
    if not os.path.exists(target):
        return
    for file in files:
        if file.exists() and os.path.samefile(file, target):
            raise UserError(f'{target} is the input itself ({source}), which would be lost: '
                            'choose another name')


def find_left_out(content, key, held, state):
    """The names of what the weights to write leave out of the input, for the report."""
    known = ('meta', 'epoch', key.partition('.')[0])
    left = [] if key == '' else [k for k in content if k not in known]
    storages = {v.untyped_storage().data_ptr() for v in state.values()}
    return left + [k for k, v in held.items() if not hasattr(v, 'untyped_storage')
                   or v.untyped_storage().data_ptr() not in storages]


def make_meta(checkpoint, family, source, path):
    """The meta that is worth keeping: plain values without anybody's paths or settings."""
    from vmamba_mm import __version__
    from vmamba_mm.checkpoints.files import sha256_of

    meta = checkpoint['meta']
    plain = {k: meta[k] for k in ('arch', 'task', 'weights', 'epoch', 'iter', 'dataset_meta')
             if k in meta}
    if path.is_file():
        plain['source_sha256'] = sha256_of(path)
    return dict(plain, family=family.name, source=os.path.basename(str(source).rstrip('/')),
                vmamba_mm_version=__version__)


def save(state, meta, family, target, to):
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
        state = to_official(state, family)
        if meta['task'] in ('det', 'seg'):
            state = dict(meta=meta, state_dict=state)
        elif family.weights_key:
            state = {family.weights_key: state}
        torch.save(state, buffer)
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
    from vmamba_mm.checkpoints.names import describe_places, infer_arch

    path = fetch(args.source)
    refuse_own_input(args.source, list_files(path), args.target)
    content = read_content(path)
    family = find_family(args.family, content, path, args.source, args.weights)
    checkpoint = select_weights(content, args.weights, path, family=family)
    state = checkpoint['state_dict']
    if 'task' in checkpoint['meta']:
        infer_arch(state, family)  # raises where the file cannot tell
    else:
        raise UserError(f'{args.source} holds {describe_places(state, family)}: convert takes '
                        f"one {family.model} under 'backbone.', with its heads beside it, or "
                        'alone; save that one alone')
    key, held, _ = choose_weights(content, args.weights, path, family)
    arch = checkpoint['meta']['arch']
    check_complete(state, arch, family, args.source)
    meta = make_meta(checkpoint, family, args.source, path)
    save(state, meta, family, args.target, to)
    count = sum(v.numel() for v in state.values())
    print(f'{args.source}: {arch if isinstance(arch, str) else f"{family.model} of its own"}, task '
          f'{meta["task"]}, {len(state)} tensors, {count:,} values'
          + (f', weights of {meta["weights"]!r}' if 'weights' in meta else ''))
    if left_out := find_left_out(content, key, held, state):
        print(f'Left out: {", ".join(map(str, left_out[:12]))}'
              + (f' and {len(left_out) - 12} more' if len(left_out) > 12 else ''))
    print(f'Written: {args.target} ({os.path.getsize(args.target) / 2**20:.1f} MiB, '
          f'{sum(p.stat().st_size for p in list_files(path)) / 2**20:.1f} MiB before)')


if __name__ == '__main__':
    cli.run(main)
