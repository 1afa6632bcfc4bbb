"""VMamba as a backbone package for OpenMMLab: ``type='vmamba_mm.VMamba'`` in any config."""

__version__ = '0.1.0'
