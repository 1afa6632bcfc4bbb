"""KEY=VALUE of --cfg-options, in more of Python's syntax than mmengine reads."""

import ast

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError

OPENING = ('[', '(', '{', 'dict(', 'list(', 'tuple(')
CALLS = {'dict': dict, 'list': list, 'tuple': tuple}
EXAMPLE = '''"custom_hooks=[dict(type='EMAHook', momentum=1e-4)]"'''


def parse_options(options):
    """{key: value} of KEY=VALUE strings.

    A value in brackets is Python, ``dict(...)`` included, with its text in quotes; ``[a,b]`` and
    ``1,2`` are lists too, as mmengine has it.
    """
    parsed = {}
    for option in options:
        key, equals, text = option.partition('=')
        if not equals or not key.strip():
            raise UserError(f'--cfg-options takes KEY=VALUE, not {option!r}')
        parsed[key.strip()] = _parse(text, option)
    return parsed


def _parse(text, option):
    from mmengine.config import DictAction

    text = text.strip()
    inner = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"' else text
    if inner.lstrip().startswith(OPENING):
        try:
            value = _literal(ast.parse(inner.strip(), mode='eval').body)
            if isinstance(value, list | tuple | dict):  # mmengine reads (1) as a tuple
                return value
        except (SyntaxError, ValueError, TypeError):
            pass
        text = inner
    elif ',' not in inner:
        return DictAction._parse_int_float_bool(inner)  # _parse_iterable takes out all spaces
    try:
        value = DictAction._parse_iterable(text)
    except (AssertionError, RecursionError):
        value = text
    if _has_syntax(value):
        raise UserError(f'--cfg-options {option}: the value is no Python; quote the whole, and the '
                        f'text in it once more, as in {EXAMPLE}')
    return value


def _literal(node):
    """The value of an expression of literals and calls of dict, list and tuple."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        if any(k.arg is None for k in node.keywords):
            raise ValueError('**')
        return CALLS[node.func.id](*map(_literal, node.args),
                                   **{k.arg: _literal(k.value) for k in node.keywords})
    if isinstance(node, ast.List | ast.Tuple):
        return (list if isinstance(node, ast.List) else tuple)(map(_literal, node.elts))
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)


def _has_syntax(value):
    """Whether a text came out that was meant as a dict or a list."""
    if isinstance(value, list | tuple):
        return any(map(_has_syntax, value))
    return isinstance(value, str) and (
        value.lstrip().startswith(('[', '(', 'dict(', 'list(', 'tuple(')) or 'dict(' in value
        or value.lstrip().startswith('{') and ':' in value)


def say_what_is_lost(before, after, option):
    """Print which hooks of the config a list given as an option has replaced."""
    lost = {type_name(h) for h in before or ()} - {type_name(h) for h in after or ()}
    if lost:
        print(f'Note: {option} replaces the whole list of the config; gone: '
              f'{", ".join(sorted(lost))}')
