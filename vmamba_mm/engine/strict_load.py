"""Loading all of a checkpoint or none of it."""

import re

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper

from vmamba_mm.compat import UserError
from vmamba_mm.registry import HOOKS


def compare_keys(model, checkpoint):
    """(missing, unexpected, mismatched) parameter names of a checkpoint against a model."""
    if is_model_wrapper(model):
        model = model.module
    if isinstance(model, BaseTTAModel):
        model = model.module
    theirs = checkpoint.get('state_dict', checkpoint)
    theirs = {re.sub(r'^module\.', '', key): value for key, value in theirs.items()}
    ours = model.state_dict()
    missing = [key for key in ours if key not in theirs]
    unexpected = [key for key in theirs if key not in ours]
    mismatched = [key for key in ours if key in theirs
                  and getattr(theirs[key], 'shape', None) != getattr(ours[key], 'shape', None)]
    return missing, unexpected, mismatched


def check_fits(model, checkpoint, name, allow=(), hint='Use the config that it was trained with'):
    """Raise one line if a checkpoint is not this model's; ``allow``: patterns of excused keys.

    Returns the excused keys.
    """
    groups = dict(zip(('missing', 'unexpected', 'of another shape'),
                      compare_keys(model, checkpoint), strict=True))
    excused = sorted({k for keys in groups.values() for k in keys
                      if any(re.search(p, k) for p in allow)})
    problems = []
    for what, keys in groups.items():
        keys = [k for k in keys if k not in excused]
        if keys:
            shown = ', '.join(keys[:3]) + (', ...' if len(keys) > 3 else '')
            problems.append(f'{len(keys)} {what} ({shown})')
    if problems:
        raise UserError(f'the checkpoint {name} is not of this config\'s model; its parameters '
                        f'are: {"; ".join(problems)}. {hint}')
    return excused


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuse a checkpoint whose parameters differ from the model's (mmengine only warns).

    Args:
        allow: regular expressions of parameter names that may differ, for example
            ``['^head\\.fc\\.']`` to fine-tune with another number of classes.
    """

    priority = 'VERY_HIGH'  # before EMAHook copies the state dict

    def __init__(self, allow=()):
        self.allow = tuple(allow)

    def after_load_checkpoint(self, runner, checkpoint):
        name = runner._load_from or 'to load'
        hint = {}
        if runner._train_loop is not None and not runner._resume:
            hint['hint'] = ('To start from it nevertheless, name those that may differ: '
                            "custom_hooks=[dict(type='vmamba_mm.StrictLoadHook', "
                            "allow=['^head'])]")
        excused = check_fits(runner.model, checkpoint, name, self.allow, **hint)
        if not excused:
            return
        runner.logger.info(f'Not loaded, as StrictLoadHook.allow says: {", ".join(excused)}')
        state = checkpoint.get('state_dict', checkpoint)
        for key in [k for k in state if re.sub(r'^module\.', '', k) in excused]:
            del state[key]
