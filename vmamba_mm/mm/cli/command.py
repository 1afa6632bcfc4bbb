"""The command line of the tools: options that several have, and how a tool ends."""

import argparse
import atexit
import os
import sys
import traceback

from vmamba_mm.mm.cli.explain import explain

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def make_parser(doc, examples):
    return argparse.ArgumentParser(
        description=doc, epilog=f'examples:\n{examples}\n\nA mistake in the input ends with one '
        'line that says what is wrong;\n--traceback, or VMAMBA_TRACEBACK=1, shows where it was '
        'found.', formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_options(parser, launcher=True):
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='change settings of the config, for example '
                        'train_dataloader.batch_size=4 model.backbone.arch=small_s1l20')
    add_traceback_option(parser)
    if launcher:
        parser.add_argument('--launcher', choices=LAUNCHERS, default='none',
                            help='how several processes were started; tools/dist_*.sh set '
                            'pytorch (default: none)')
        # Passed by old launchers; torchrun sets LOCAL_RANK.
        parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)


def add_traceback_option(parser):
    """Mentioned in the epilog, not among the options."""
    parser.add_argument('--traceback', action='store_true', help=argparse.SUPPRESS)


def add_weights_option(parser):
    parser.add_argument('--weights', choices=('auto', 'model', 'model_ema'), default='auto',
                        help='which weights of a training file that holds two sets: model_ema '
                        'are the averaged ones, whatever the trainer calls them; auto takes them '
                        'where they are present, else model (default: auto)')


def add_device_option(parser):
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ... (default: a GPU if there is one)')


def shorten(items, most=5):
    """Them in one line, or the first few and how many more."""
    left = len(items) - most
    return ', '.join(map(str, items[:most])) + (f' and {left} more' if left > 0 else '')


def wants_traceback():
    return ('--traceback' in sys.argv
            or os.environ.get('VMAMBA_TRACEBACK', '0') not in ('', '0'))


def run(main):
    """Call ``main`` and turn a user's mistake into one line on stderr and exit code 1."""
    os.environ.setdefault('PIP_REQUIRE_VIRTUALENV', '1')  # whatever a package may run
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
        print('stopped', file=sys.stderr)
    except Exception as err:
        message = explain(err)
        if message is None:
            raise
        if wants_traceback():
            traceback.print_exc()
        rank = os.environ.get('RANK')
        who = f' (process {rank})' if rank else ''
        print(f'error{who}: {message}', file=sys.stderr, flush=True)
        code = 1
    if _close_process_group():
        # All is done and cleaned up. A helper thread of several processes' communication that
        # meets a dying interpreter can still abort it (exit code -6), so do not wait for that.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _close_process_group():
    """Whether there was one."""
    dist = getattr(sys.modules.get('torch'), 'distributed', None)
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return False
    dist.destroy_process_group()
    return True
