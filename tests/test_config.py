"""A type of a config in all the ways that it may be written."""

import pytest

from vmamba_mm.config import scopes_of, type_name


class Subclass(dict):
    pass


@pytest.mark.parametrize(('kind', 'name', 'scopes'), [
    ('EMAHook', 'EMAHook', []), ('mmengine.EMAHook', 'EMAHook', ['mmengine']),
    ('mmengine.hooks.ema_hook.EMAHook', 'EMAHook', ['mmengine']), (dict, 'dict', ['builtins']),
    (Subclass, 'Subclass', [Subclass.__module__, 'builtins']),
    (pytest.raises, 'raises', ['_pytest']), (None, '', []), ('', '', [])],
    ids=lambda value: getattr(value, '__name__', None) or str(value))
def test_types(kind, name, scopes):
    for node in (kind, dict(type=kind, momentum=1)):
        assert type_name(node) == name
        assert list(scopes_of(node)) == scopes
    assert type_name({}) == '' and list(scopes_of({})) == []


def test_lazy_types(tmp_path, mm):
    """mmengine's stand-ins for what a config imports, before and after they are imported."""
    from mmengine.config import Config
    from mmengine.config.lazy import LazyAttr, LazyObject
    from mmengine.hooks import EMAHook

    path = tmp_path / 'config.py'
    path.write_text('import mmengine.hooks\nfrom mmengine.hooks import EMAHook\n'
                    'a = dict(type=EMAHook)\nb = dict(type=mmengine.hooks.EMAHook)\n')
    cfg = Config.fromfile(path)
    lazy = cfg._to_lazy_dict()
    assert isinstance(lazy['a']['type'], LazyObject) and isinstance(lazy['b']['type'], LazyAttr)
    assert cfg.a.type is EMAHook
    for node in (cfg.a, cfg.b, lazy['a'], lazy['b'], cfg.to_dict()['a']):
        assert type_name(node) == 'EMAHook' and next(scopes_of(node)) == 'mmengine'
