"""mmengine's side of the house. Importing it (``custom_imports = dict(imports=['vmamba_mm.mm'])``,
or any tool of tools/) changes mmengine for the process: see :mod:`vmamba_mm.mm.loading` (its loader
of checkpoints) and :mod:`vmamba_mm.mm.compat` (how it finds packages). The models need neither.
"""

from importlib.util import find_spec

if find_spec('mmengine') is not None:  # without it there is nothing to change
    import vmamba_mm.mm.loading  # noqa: F401
