"""The nine published architectures, and the check of a user's own."""

import math
from collections.abc import Mapping
from typing import Any


def _arch(embed_dims: int, depths: tuple[int, ...], *, vanilla: bool = False,
          ssm_ratio: float = 1.0) -> dict[str, Any]:
    return dict(
        embed_dims=embed_dims, depths=depths, d_state=16 if vanilla else 1, ssm_ratio=ssm_ratio,
        dt_rank='auto', conv_bias=vanilla, gate=vanilla, mlp_ratio=0.0 if vanilla else 4.0,
        stem='patch' if vanilla else 'conv', downsample='merge' if vanilla else 'conv',
        scan='cross')


#: Published variants: s = ssm_ratio, l = blocks of the third stage (arXiv 2401.10166, table 6).
ARCH_SETTINGS = {
    'vanilla_tiny': _arch(96, (2, 2, 9, 2), vanilla=True, ssm_ratio=2.0),
    'vanilla_small': _arch(96, (2, 2, 27, 2), vanilla=True, ssm_ratio=2.0),
    'vanilla_base': _arch(128, (2, 2, 27, 2), vanilla=True, ssm_ratio=2.0),
    'tiny_s2l5': _arch(96, (2, 2, 5, 2), ssm_ratio=2.0),
    'small_s2l15': _arch(96, (2, 2, 15, 2), ssm_ratio=2.0),
    'base_s2l15': _arch(128, (2, 2, 15, 2), ssm_ratio=2.0),
    'tiny_s1l8': _arch(96, (2, 2, 8, 2)),
    'small_s1l20': _arch(96, (2, 2, 20, 2)),
    'base_s1l20': _arch(128, (2, 2, 20, 2)),
}


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


#: key -> (test, what is allowed)
_RULES = {
    'embed_dims': (lambda v: _is_int(v, 2) and v % 2 == 0, 'an even int of at least 2'),
    'depths': (lambda v: isinstance(v, (tuple, list)) and len(v) == 4
               and all(_is_int(d, 1) for d in v), '4 ints of at least 1'),
    'd_state': (lambda v: _is_int(v, 1), 'an int of at least 1'),
    'ssm_ratio': (lambda v: _is_number(v) and v > 0, 'a number above 0'),
    'dt_rank': (lambda v: v == 'auto' or _is_int(v, 1), "'auto' or an int of at least 1"),
    'conv_bias': (lambda v: isinstance(v, bool), 'True or False'),
    'gate': (lambda v: isinstance(v, bool), 'True or False'),
    'mlp_ratio': (lambda v: _is_number(v) and v >= 0, 'a number of at least 0 (0: no MLP)'),
    'stem': (lambda v: v in ('patch', 'conv'), "'patch' or 'conv'"),
    'downsample': (lambda v: v in ('merge', 'conv'), "'merge' or 'conv'"),
    # Which names there are, the ops know, as others may register theirs: SS2D asks them.
    'scan': (lambda v: isinstance(v, str), "a str, such as 'cross'"),
}
#: As above, for keys that may be absent: SS2D's own defaults are what is published.
_OPTIONAL = {
    'act': (lambda v: v in ('silu', 'gelu', 'relu'), "'silu', 'gelu' or 'relu'"),
    'conv_kernel': (lambda v: _is_int(v, 0) and (v == 0 or v % 2 == 1 and v > 1),
                    '0 (no convolution) or an odd int of at least 3'),
    'ssm_init': (lambda v: v in ('mamba', 'random', 'zero'), "'mamba', 'random' or 'zero'"),
}


def resolve_arch(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a named architecture, or a checked copy of a user's dict.

    With the key ``base``, the name of a published architecture, the dict only says what differs
    from it: ``dict(base='tiny_s1l8', depths=(2, 2, 4, 2))``.

    Raises:
        ValueError: on an unknown name, unknown or missing keys, or a value that is not allowed.
    """
    if isinstance(arch, str):
        if arch not in ARCH_SETTINGS:
            raise ValueError(f'arch={arch!r} does not exist; choose one of '
                             f'{sorted(ARCH_SETTINGS)}, or pass a dict with the keys '
                             f'{list(_RULES)} (optional: {list(_OPTIONAL)}), or with base=NAME '
                             'and the keys that differ from it')
        return dict(ARCH_SETTINGS[arch])
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be a name or a dict, got {type(arch).__name__}; names: '
                         f'{sorted(ARCH_SETTINGS)}')
    if 'base' in arch:
        base = arch['base']
        if not isinstance(base, str) or base not in ARCH_SETTINGS:
            raise ValueError(f"arch['base']={base!r} does not exist; choose one of "
                             f'{sorted(ARCH_SETTINGS)}')
        arch = {**ARCH_SETTINGS[base], **{k: v for k, v in arch.items() if k != 'base'}}
    unknown = sorted(set(arch) - set(_RULES) - set(_OPTIONAL))
    missing = sorted(set(_RULES) - set(arch))
    if unknown or missing:
        raise ValueError(f'arch has unknown keys {unknown} and lacks {missing}; it must have '
                         f'the keys {list(_RULES)} and may have {list(_OPTIONAL)}')
    for key, (allowed, choices) in {**_RULES, **_OPTIONAL}.items():
        if key in arch and not allowed(arch[key]):
            raise ValueError(f'arch[{key!r}]={arch[key]!r} is not allowed; it must be {choices}')
    for key, part in (('ssm_ratio', 'SS2D'), ('mlp_ratio', 'the MLP')):
        if 0 < arch[key] and int(arch[key] * arch['embed_dims']) == 0:
            zero = ', or 0 for no MLP' if key == 'mlp_ratio' else ''
            raise ValueError(f'arch[{key!r}]={arch[key]!r} leaves {part} no channel of the '
                             f'{arch["embed_dims"]} of embed_dims; it must be at least '
                             f'1/{arch["embed_dims"]}{zero}')
    return dict(arch, depths=tuple(arch['depths']))
