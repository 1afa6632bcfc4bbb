"""What the command-line tools share, as one namespace: ``from vmamba_mm.mm import cli``.

=============  =====================================================================
``command``    options that several tools have, and how a tool ends
``explain``    an error that the user can cure, as one line
``configs``    reading a config, what task it is of, the data sets in it
``options``    the KEY=VALUE of --cfg-options
``checks``     settings and paths that cannot work, found before anything is built
``runs``       devices, processes, loaders and hooks; the model and the runner
``images``     the images that a tool is given, and the pictures that it makes
=============  =====================================================================
"""

from vmamba_mm.mm.cli.checks import check_data_paths, check_testing, check_training
from vmamba_mm.mm.cli.command import (
    add_common_options,
    add_device_option,
    add_traceback_option,
    add_weights_option,
    make_parser,
    run,
    shorten,
    wants_traceback,
)
from vmamba_mm.mm.cli.configs import (
    datasets_of,
    families_of,
    find_task,
    load_config,
    set_work_dir,
)
from vmamba_mm.mm.cli.explain import explain
from vmamba_mm.mm.cli.runs import (
    DDP_OPTIONS,
    add_hooks,
    build_model,
    build_runner,
    choose_device,
    evaluate_in_fp32_without_gpu,
    has_gpu,
    model_settings,
    set_loader_defaults,
    start_processes,
    sync_to_plain_batch_norm,
)

__all__ = ['DDP_OPTIONS', 'add_common_options', 'add_device_option', 'add_hooks',
           'add_traceback_option', 'add_weights_option', 'build_model', 'build_runner',
           'check_data_paths', 'check_testing', 'check_training', 'choose_device', 'datasets_of',
           'evaluate_in_fp32_without_gpu', 'explain', 'families_of', 'find_task', 'has_gpu',
           'load_config', 'make_parser', 'model_settings', 'run', 'set_loader_defaults',
           'set_work_dir', 'shorten', 'start_processes', 'sync_to_plain_batch_norm',
           'wants_traceback']
