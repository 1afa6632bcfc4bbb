"""What a config's ``type`` means, however it is written.

It may be a name (``'VMamba'``), a name with its scope (``'vmamba_mm.VMamba'``), a full path
(``'vmamba_mm.models.vmamba.VMamba'``), or, in mmengine's pure Python style, the class itself or
mmengine's lazy stand-in for it.
"""

from collections.abc import Iterator
from typing import Any


def type_of(node: Any) -> Any:
    """The ``type`` of a config's dict; anything else is taken for a type itself."""
    return node.get('type') if isinstance(node, dict) else node


def type_name(node: Any) -> str:
    """The bare name, such as ``'VMamba'``, of a type or of a config's dict; '' without one."""
    kind = type_of(node)
    if kind is None:
        return ''
    # str() of mmengine's lazy objects is the name that was imported.
    name = getattr(kind, '__name__', None) if isinstance(kind, type) or callable(kind) else None
    return (name if isinstance(name, str) else str(kind)).rpartition('.')[2]


def names_of(node: Any) -> Iterator[str]:
    """'package.Name' of a type with its scope or of a class, then of each of its base classes."""
    kind = type_of(node)
    if isinstance(kind, type):
        yield from (f'{base.__module__.partition(".")[0]}.{base.__name__}' for base in kind.__mro__)
    else:
        yield from (f'{scope}.{type_name(kind)}' for scope in scopes_of(kind))


def scopes_of(node: Any) -> Iterator[str]:
    """The packages a type may be looked up in: its own first, then those of its base classes.

    A bare name has none.
    """
    kind = type_of(node)
    if isinstance(kind, type):
        yield from dict.fromkeys(base.__module__.partition('.')[0] for base in kind.__mro__)
    elif isinstance(kind, str):
        if '.' in kind:
            yield kind.partition('.')[0]
    elif kind is not None:
        yield str(getattr(kind, 'module', None) or getattr(kind, '__module__', '')) \
            .partition('.')[0]
