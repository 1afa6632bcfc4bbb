"""Reading a config, what task it is of, and the data sets in it."""

import difflib
import os
from pathlib import Path

from vmamba_mm.config import names_of, scopes_of, type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.options import parse_options, say_what_is_lost
from vmamba_mm.mm.compat import prepare_mm, require, require_working
from vmamba_mm.mm.tasks import TASKS, scopes


def load_config(path, options=()):
    """Read a config file, or a stock one as ``mmdet::folder/name.py``, and apply KEY=VALUE."""
    prepare_mm()
    from mmengine.config import Config

    try:
        if '::' in path:
            from mmengine.hub import get_config
            cfg = get_config(path)
        else:
            if not os.path.isfile(path):
                raise UserError(f'the config {path} does not exist{_similar_files(path)}')
            cfg = Config.fromfile(path)
    except UserError:
        raise
    except Exception as err:
        raise UserError(f'the config {path} cannot be read: {type(err).__name__}: {err}') from err
    if options:
        hooks = list(cfg.get('custom_hooks') or ())
        try:
            cfg.merge_from_dict(parse_options(options))
        except (KeyError, TypeError, IndexError, AttributeError, AssertionError) as err:
            raise UserError(f'--cfg-options {" ".join(options)}: {err}') from err
        say_what_is_lost(hooks, cfg.get('custom_hooks'), '--cfg-options custom_hooks=')
    if cfg.get('model') is None:
        raise UserError(f'the config {path} has no model')
    find_task(cfg)
    if not isinstance(cfg.model.get('type'), str) or cfg.model.type.count('.') > 1:
        # In mmengine's pure Python style nothing looks names up in a scope, but what the tools add
        # to the config does.
        cfg.default_scope = cfg.get('default_scope') or 'mmengine'
    return cfg


def _similar_files(path):
    folder = Path(path).parent
    if not folder.is_dir():
        return f' (no folder {folder})'
    close = difflib.get_close_matches(Path(path).name, [p.name for p in folder.iterdir()], n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def find_task(cfg):
    """The :class:`vmamba_mm.mm.tasks.Task` of a config, whose package is installed.

    None for a model that is of none of their packages: what needs no task works for it too.

    It follows from the model's type where that names a package or is a class (of a package or
    derived from one of its), else from default_scope, which is set where the config has none.

    Raises:
        UserError: if there is no such scope or model, as in a config of another OpenMMLab package.
    """
    kind, default = cfg.model.get('type'), cfg.get('default_scope')
    keys = [*names_of(kind), *scopes_of(kind), cfg.model.get('_scope_'), default]
    task = next((TASKS[key] for key in keys if key in TASKS), None)
    model_type = kind
    if task is None and (kind is None or isinstance(kind, str)):
        model_type = _find_class(kind, default)
        keys = [*names_of(model_type), *scopes_of(model_type)]
        task = next((TASKS[key] for key in keys if key in TASKS), None)
    if model_type is None or default and not _is_scope(default):
        raise UserError(
            f"the config's model type={kind!r} and default_scope={default!r} are of no task that "
            f'is known here: default_scope is {", ".join(map(repr, scopes()))}, or, in a config of '
            "'mmengine', the model's type begins with one of them, as 'mmdet.MaskRCNN' does")
    if task is None:
        return None
    if task.scope:
        require_working(task.scope)
    for module in task.modules:
        require(module)
    if not default:
        cfg.default_scope = task.scope or 'mmengine'
    return task


def _is_scope(name):
    """Whether a default_scope is that of a package, or of a registry that was made."""
    from importlib.util import find_spec

    from mmengine.registry import MODELS

    return name in MODELS.children or name.isidentifier() and find_spec(name) is not None


def _find_class(kind, scope):
    """The class that a registry holds under a type's name, or None."""
    import logging

    from mmengine.registry import MODELS

    logging.disable(logging.WARNING)  # mmengine's advice to install a package
    try:
        with MODELS.switch_scope_and_registry(scope or 'mmengine') as registry:
            return registry.get(kind)
    except Exception:  # of packages that are not installed, or of modules that do not exist
        return None
    finally:
        logging.disable(logging.NOTSET)


def families_of(cfg):
    """The families of the models in a config: what a file holds is one of theirs."""
    from vmamba_mm.families import FAMILIES

    found, parts = set(), [cfg.get('model')]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            found.add(type_name(part))
        if isinstance(part, dict | list | tuple):
            parts += part.values() if isinstance(part, dict) else part
    return [family for family in FAMILIES.values()
            if not found.isdisjoint((family.model, *family.dense_models.values()))]


def set_work_dir(cfg, args):
    """--work-dir, else the config's own, else work_dirs/<name of the config>."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config.rpartition('::')[2]).stem)


def datasets_of(dataset, name):
    """Every innermost data set of a config with its place in it."""
    if dataset.get('dataset') is not None:
        yield from datasets_of(dataset.dataset, f'{name}.dataset')
    elif dataset.get('datasets') is not None:
        for i, inner in enumerate(dataset.datasets):
            yield from datasets_of(inner, f'{name}.datasets.{i}')
    else:
        yield name, dataset
