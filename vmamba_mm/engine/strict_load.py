"""Loading all of a checkpoint or none of it."""

import re

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop

from vmamba_mm.checkpoint import differences, explain_differences, find_excused, fit_names
from vmamba_mm.compat import UserError
from vmamba_mm.registry import HOOKS


def check_fits(model, checkpoint, name, allow=(), hint=''):
    """Raise one line if a checkpoint is not this model's; ``allow``: patterns of excused keys.

    Returns:
        The checkpoint's weights by the model's own names, wherever it has its VMamba, and the
        excused names. Those have the model's own values, so that the weights fit exactly.
    """
    if is_model_wrapper(model):
        model = model.module
    if isinstance(model, BaseTTAModel):
        model = model.module
    ours = model.state_dict()
    theirs = checkpoint.get('state_dict', checkpoint)
    theirs = {re.sub(r'^module\.', '', key): value for key, value in theirs.items()}
    theirs = fit_names(theirs, ours)
    wrong = differences(ours, theirs)
    excused = find_excused(wrong, allow)
    wrong = {k: v for k, v in wrong.items() if k not in excused}
    if wrong:
        raise UserError(explain_differences(wrong, ours, theirs, name) + hint)
    for key in excused:
        theirs.pop(key, None)
        if key in ours:
            theirs[key] = ours[key]
    return theirs, excused


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuse a checkpoint whose parameters differ from the model's (mmengine only warns).

    Args:
        allow: regular expressions of parameter names that may differ, for example
            ``['^head\\.fc\\.']`` to fine-tune with another number of classes. Those of a backbone's
            names may leave ``backbone.`` out.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the state dict

    def __init__(self, allow=()):
        self.allow = (allow,) if isinstance(allow, str) else tuple(allow)

    def after_load_checkpoint(self, runner, checkpoint):
        name = runner._load_from or 'to load'
        hint = ''
        if isinstance(runner._train_loop, BaseLoop) and not runner._resume:
            hint = ('. To start from it nevertheless, name those that may differ: '
                    "custom_hooks=[dict(type='vmamba_mm.StrictLoadHook', allow=['^head'])]")
        state, excused = check_fits(runner.model, checkpoint, name, self.allow, hint)
        if excused or set(state) != set(checkpoint.get('state_dict', checkpoint)):
            checkpoint['state_dict'] = state
        if excused:
            runner.logger.info(f'Not loaded, as StrictLoadHook.allow says: {", ".join(excused)}')
