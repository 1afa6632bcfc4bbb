"""The parameters of a CUDA kernel, read from the struct in its source: names, types, bytes.

A kernel takes one struct, or nothing. Its fields have the names that they have in the source, those
of a struct within it with the name of that before them: ``Map x`` with a ``stride_b`` has a field
``x_stride_b``. An array is one field, whose value is a sequence. So a struct is written down once,
where the kernel is.
"""

import re
import struct
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import NamedTuple

_LETTERS = {'int': 'i', 'u32': 'I', 'long long': 'q', 'float': 'f', 'double': 'd'}


class Field(NamedTuple):
    """``letter`` is that of the module struct, P for a pointer; ``count`` of an array, else 0."""
    name: str
    letter: str
    count: int = 0

    @property
    def format(self) -> str:
        return self.letter * (self.count or 1)


def fields_of(source: str, kernel: str) -> tuple[Field, ...]:
    """The fields of the struct that ``kernel`` takes, such as ``'scan<float, 16>'``.

    Args:
        source: of the kernel and all headers of ours that it includes.

    Raises:
        ValueError: if there is no such kernel, or it takes something else than one struct.
    """
    source = re.sub(r'//[^\n]*|/\*.*?\*/', ' ', source, flags=re.DOTALL)
    name = kernel.partition('<')[0]
    signature = re.search(rf'__global__\b[^;{{]*?\b{name}\s*\(([^)]*)\)\s*{{', source)
    if not signature:
        raise ValueError(f'there is no kernel {name!r} in the source')
    if not signature[1].strip():
        return ()
    struct_type = re.fullmatch(
        r'\s*(?:const\s+|__grid_constant__\s+)*(\w+)(?:<[^>]*>)?\s+\w+\s*', signature[1])
    if not struct_type:
        raise ValueError(f'{name} takes ({signature[1].strip()}), not one struct')
    return tuple(_fields(source, struct_type[1], ''))


def _fields(source: str, type_: str, prefix: str) -> Iterable[Field]:
    body = re.search(rf'\bstruct\s+(?:alignas\(\d+\)\s+)?{type_}\s*{{([^{{}}]*)}}', source)
    if not body:
        raise ValueError(f'there is no plain struct {type_!r} in the source')
    for statement in filter(None, map(str.strip, body[1].split(';'))):
        type_, names = re.match(r'(?:const\s+)?(long long|\w+)(.*)', statement, re.DOTALL).groups()
        for declared in names.split(','):
            match = re.fullmatch(r'\s*(\*?)\s*(\w+)\s*(?:\[(.+)\])?\s*', declared)
            if not match:
                raise ValueError(f'{statement!r} is not understood as a field')
            star, name, count = match.groups()
            count = _evaluate_sum(source, count) if count else 0
            if star or type_ in _LETTERS:
                yield Field(prefix + name, 'P' if star else _LETTERS[type_], count)
            elif count:
                raise ValueError(f'{statement!r} is an array of structs')
            else:
                yield from _fields(source, type_, f'{prefix}{name}_')


def _evaluate_sum(source: str, text: str) -> int:
    """The value of a sum of numbers and constants of the source."""
    total = 0
    for term in map(str.strip, text.split('+')):
        constant = re.search(rf'constexpr\s+int\s[^;]*\b{term}\s*=\s*(\d+)', source)
        total += int(constant[1] if constant else term)
    return total


def packed_size(fields: Iterable[Field]) -> int:
    """Bytes of a C struct with these fields."""
    letters = ''.join(field.format for field in fields)
    return struct.calcsize(f'@{letters}0{max(letters, key=struct.calcsize, default="i")}')


def bind_fields(fields: tuple[Field, ...], start: Callable[[bytes], None], what: object,
                per_call: Iterable[str], constants: dict[str, object]) -> Callable[..., None]:
    """A function that packs the struct and calls ``start`` with its bytes.

    ``constants`` are packed here, once. The function takes, by name, the addresses that are not
    among them, each null unless given, and the ``per_call`` fields, which must be given. The value
    of an array is a sequence of its length.

    Raises:
        TypeError: if there is no such field, if a number is neither constant nor in ``per_call``,
            or if a name or a length is wrong in a call.
        struct.error: if the type or range of a value does not fit.
    """
    per_call = set(per_call)
    names = {field.name for field in fields}
    missing = [field.name for field in fields
               if field.letter != 'P' and field.name not in {*constants, *per_call}]
    for fault, of in (('has no', {*constants, *per_call} - names), ('also needs', missing),
                      ('has as a constant and for each call', per_call & constants.keys())):
        if of:
            raise TypeError(f'{what} {fault} {", ".join(sorted(of))}')

    # Bytes for what is constant, with the gaps that C leaves between fields, else the field.
    pieces, end = [], 0
    for field in fields:
        aligned = struct.calcsize(f'@{end}s0{field.letter}')
        pieces.append(bytes(aligned - end))
        end = aligned + struct.calcsize(f'@{field.format}')
        if field.name in constants:
            value = constants[field.name]
            values = value if field.count else (value,)
            pieces.append(struct.pack(f'@{field.format}', *values))
        else:
            pieces.append(field)
    pieces.append(bytes(packed_size(fields) - end))
    packed, values, keywords, scope = '@', [], [], {'start': start}
    for constant, group in groupby(pieces, key=lambda piece: isinstance(piece, bytes)):
        if constant:
            joined, name = b''.join(group), f'constant{len(values)}'
            if joined:
                packed += f'{len(joined)}s'
                values.append(name)
                scope[name] = joined
            continue
        for field in group:
            packed += field.format
            default = (0,) * field.count if field.count else 0
            keywords.append(field.name if field.name in per_call else f'{field.name}={default}')
            values.append(f'*{field.name}' if field.count else field.name)
    scope['pack'] = struct.Struct(packed).pack
    # A function written for these names, as namedtuple does: keywords cost next to nothing then.
    return eval(f'lambda {"*, " if keywords else ""}{", ".join(keywords)}: '
                f'start(pack({", ".join(values)}))', scope)
