"""Errors that the user can cure, as one line that says what is wrong and what to do.

A :class:`vmamba_mm.errors.UserError` is such a line already. The others are of torch and mm*, whose
messages speak of their own insides; they are recognised by their text, so that a new version may
need a new line here: tests/tools/test_tools_errors.py has a test of each. What is not recognised
is a fault of the program and keeps its traceback.
"""

import difflib
import re

from vmamba_mm.errors import UserError
from vmamba_mm.mm.compat import EXTRAS, missing_package


def explain(err):
    """One line for an error that the user can cure, None for one that needs a traceback."""
    message = _explain(err)
    return None if message is None else ' '.join(message.split())


def _explain(err):
    text = _own_message(err)
    if isinstance(err, UserError):
        return str(err)
    if isinstance(err, ModuleNotFoundError) and err.name in (*EXTRAS, 'mmcv._ext'):
        return str(missing_package(err.name))
    if isinstance(err, OSError):
        if err.filename is not None:
            return f'{err.strerror}: {err.filename}'
        return text if isinstance(err, FileNotFoundError) else None
    if isinstance(err, KeyError) and 'registry' in text:
        return _explain_type(text)
    if type(err).__name__ == 'OutOfMemoryError':
        return ('the GPU memory is used up; lower train_dataloader.batch_size, train with --amp '
                'or set model.backbone.with_cp=True')
    if isinstance(err, TypeError) and 'unexpected keyword argument' in text:
        return f'the config gives a setting that its type does not have: {text}'
    channels = re.search(r'to have (\d+) channels, but got (\d+) channels instead', text)
    if channels:
        return (f'the images have {channels[2]} channels, and the model takes {channels[1]}: set '
                'model.backbone.in_channels, and mean and std of the data_preprocessor, to the '
                "images' channels, or let the pipeline load others (LoadImageFromFile.color_type)")
    if isinstance(err, ValueError | TypeError) and _raised_in(err, 'vmamba_mm'):
        return text
    if isinstance(err, ValueError | TypeError) and _raised_in(err, 'torch.optim'):
        return f'optim_wrapper.optimizer of the config is not allowed: {text}'
    if isinstance(err, AssertionError) and text.startswith('self.begin_'):
        return f'an EMAHook of the config begins after the end of the training: {text}'
    if 'TTA of instance segmentation' in text:
        return 'mmdet has no test-time augmentation for models with masks: test without --tta'
    if 'end should be larger than begin' in text:
        return (f'a schedule of param_scheduler begins when the training is over ({text}): the '
                'run is shorter than its warm-up; change param_scheduler or train longer')
    if 'parameters that were not used in producing loss' in text:
        return ('some parameters have no part in the loss, which several processes do not allow: '
                'let model.backbone.out_indices name the outputs in use, or set '
                'find_unused_parameters=True')
    if 'need at least one array to concatenate' in text:
        return _explain_empty(err)
    known = ('Found 0 files in subfolders of', 'Failed to load `ann_file`',
             "doesn't match the number of specified classes")
    if any(k in text for k in known):
        return text
    return None


def _explain_empty(err):
    """mmengine cannot pack a data set of no samples: look for it in the frames of the error."""
    from vmamba_mm.mm.labels import check_categories

    frame = err.__traceback__
    while frame is not None:
        dataset = frame.tb_frame.f_locals.get('self')
        if hasattr(dataset, 'ann_file') and hasattr(dataset, 'metainfo'):
            try:
                check_categories(dataset, 'the dataset', lambda line: None)
            except UserError as reason:
                return str(reason)
            return (f'the data set {type(dataset).__name__} ({dataset.ann_file}) has no samples, '
                    'or its filter_cfg leaves none')
        frame = frame.tb_next
    return None


def _own_message(err):
    """An error's text, without the traceback that a DataLoader worker sends along."""
    text = str(err.args[0]) if isinstance(err, KeyError) and err.args else str(err)
    if text.startswith('Caught ') and 'DataLoader worker' in text:
        text = text.strip().splitlines()[-1].partition(': ')[2]
    return text


def _raised_in(err, package):
    """Whether the innermost frame of an error is in a package or module."""
    frame = err.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return f'{frame.tb_frame.f_globals.get("__name__", "")}.'.startswith(f'{package}.')


def _explain_type(text):
    match = re.search(r'(\S+) is not in the (.+?) registry', text)
    if not match:
        return text
    name, registry = match[1].strip('\'"'), match[2].rpartition('::')[2]
    close = difflib.get_close_matches(name.rpartition('.')[2], _registered(registry), n=3)
    hint = f'; did you mean {" or ".join(close)}?' if close else ''
    return f"the config names type='{name}', which no {registry} registry has{hint}"


def _registered(registry_name):
    from mmengine.registry import Registry, root

    names = set()

    def collect(registry):
        names.update(registry.module_dict)
        for child in registry.children.values():
            collect(child)

    for value in vars(root).values():
        if isinstance(value, Registry) and value.name == registry_name:
            collect(value)
    return names
