"""Loading all of a checkpoint or none of it."""

import re
import shlex

from mmengine.hooks import Hook
from mmengine.runner import BaseLoop

from vmamba_mm.checkpoints.compare import (
    check_patterns,
    differences,
    explain_differences,
    find_excused,
    fit_names,
)
from vmamba_mm.errors import UserError
from vmamba_mm.mm.wrappers import unwrapped
from vmamba_mm.registry import HOOKS


def check_fits(model, checkpoint, name, allow=(), hint=None):
    """Raise one line if a checkpoint is not this model's.

    Args:
        allow: regular expressions of names that are excused.
        hint: gives the end of the line for the names that differ.

    Returns:
        The checkpoint's weights by the model's own names, wherever it has its VMamba, and the
        excused names. Those have the model's own values, so that the weights fit exactly.
    """
    model = unwrapped(model)
    ours = model.state_dict()
    theirs = checkpoint.get('state_dict', checkpoint)
    theirs = {re.sub(r'^module\.', '', key): value for key, value in theirs.items()}
    theirs = fit_names(theirs, ours)
    wrong = differences(ours, theirs)
    excused = find_excused(wrong, allow)
    wrong = {k: v for k, v in wrong.items() if k not in excused}
    if wrong:
        raise UserError(explain_differences(wrong, ours, theirs, name)
                        + (hint(wrong) if hint else ''))
    for key in excused:
        theirs.pop(key, None)
        if key in ours:
            theirs[key] = ours[key]
    return theirs, excused


def patterns_of(names, most=4):
    """Regular expressions for parameters' names: ``most``, or for each name's first word."""
    paths = [name.split('.')[:-1] or [name] for name in names]
    for depth in range(max(map(len, paths)), 0, -1):
        prefixes = dict.fromkeys('.'.join(path[:depth]) for path in paths)
        if len(prefixes) <= most:
            break
    return [f'^{re.escape(prefix)}' + r'\b' for prefix in prefixes]


def how_to_allow(names):
    """The end of a message: how to start from a checkpoint in which these parameters differ."""
    patterns = patterns_of(names)
    if len(patterns) > 8:  # another model altogether
        return ''
    option = ' '.join(map(shlex.quote, patterns))
    key = ', '.join(f"r'{p}'" for p in patterns)
    return ('. To start from it nevertheless, tell StrictLoadHook which may differ: '
            f'--allow-mismatch {option} (or, in the config, allow_mismatch = [{key}])')


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuse a checkpoint whose parameters differ from the model's (mmengine only warns).

    Args:
        allow: regular expressions of the names of parameters that may differ, for example
            ``['^auxiliary_head']``; those of a backbone's names may leave ``backbone.`` out. When
            a training starts from a checkpoint, the config's key ``allow_mismatch`` is added to
            them: what is resumed or tested later has to fit again.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the state dict

    def __init__(self, allow=()):
        self.allow = check_patterns(allow, 'StrictLoadHook.allow')

    def after_load_checkpoint(self, runner, checkpoint):
        name = runner._load_from or 'to load'
        allow, hint = self.allow, None
        if isinstance(runner._train_loop, BaseLoop) and not runner._resume:
            more = check_patterns(runner.cfg.get('allow_mismatch') or (), 'allow_mismatch')
            allow, hint = [*dict.fromkeys([*allow, *more])], how_to_allow
        state, excused = check_fits(runner.model, checkpoint, name, allow, hint)
        if excused or set(state) != set(checkpoint.get('state_dict', checkpoint)):
            checkpoint['state_dict'] = state
        if excused:
            runner.logger.info(f'Not loaded, as StrictLoadHook.allow says: {", ".join(excused)}')
            # It has the averages already, and mmpretrain's EMAHook would load these strictly.
            checkpoint.pop('ema_state_dict', None)
