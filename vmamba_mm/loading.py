"""mmengine reads checkpoints with :func:`vmamba_mm.files.read_checkpoint` once this is imported.

mmengine's own loader of local files falls back to running the pickle's code, and knows no official
VMamba names. So ``load_from``, ``init_cfg`` of any module and the inferencers take official files.
"""

from mmengine.runner.checkpoint import CheckpointLoader

from vmamba_mm.compat import prepare_mm
from vmamba_mm.files import read_checkpoint

# Other web addresses stay mmengine's: its cache may hold them already.
PREFIXES = ('', 'file://', 'https://github.com/MzeroMiko/VMamba/')


def register(weights='auto'):
    """Register the loader; ``weights`` as in ``read_checkpoint``."""

    def load_from_vmamba_mm(filename, map_location=None):
        return read_checkpoint(filename, weights, map_location)

    CheckpointLoader.register_scheme(PREFIXES, load_from_vmamba_mm, force=True)


prepare_mm()
register()
