"""VMamba as a backbone package for OpenMMLab: ``type='vmamba_mm.VMamba'`` in any config."""

__version__ = '0.1.0'


def __getattr__(name: str):
    """The models by the names that configs call them, ``vmamba_mm.VMamba``.

    Their module, with torch and mmengine, is imported when one of them is asked for first.
    """
    if name[:1].isupper():
        from importlib import import_module
        models = import_module('vmamba_mm.models')
        if name in models.__all__:
            return getattr(models, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
