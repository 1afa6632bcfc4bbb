"""The options that the benchmarks of whole models have in common."""

import torch

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli


def add_run_options(parser, shrink):
    """``shrink``: what --shrink does, in words."""
    parser.add_argument('--quick', action='store_true', help='a fifth of the repetitions')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--shrink', type=int, default=1, metavar='N', help=shrink)
    parser.add_argument('--merge', nargs='+', default=[], metavar='CSV',
                        help='show the rows of earlier runs too; those measured now replace them')
    parser.add_argument('--csv', metavar='FILE', help='write all rows there')
    cli.add_traceback_option(parser)


def check_run_options(args, chosen, default, try_out):
    """The cases to measure: ``chosen``, by default ``default``, or none with --merge.

    Raises:
        UserError: if --shrink makes no sense, or there is no GPU to measure on; ``try_out`` are
            the options that try the tool out on a CPU.
    """
    if args.shrink < 1:
        raise UserError(f'--shrink must be at least 1, got {args.shrink}')
    if chosen is None:
        chosen = () if args.merge else default
    if chosen and args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'torch finds no GPU here; {try_out} tries the tool out')
    return tuple(chosen)
