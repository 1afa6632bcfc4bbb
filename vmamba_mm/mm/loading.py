"""mmengine reads checkpoints with ``checkpoints.files.read_checkpoint`` once this is imported.

mmengine's own loaders of files and web addresses can run a pickle's code, and know no official
VMamba names. So ``load_from``, ``init_cfg`` of any module and the inferencers take official files,
and a hostile one is refused whichever way it comes. Importing this also lets mmengine find the
configs of packages that it has another name for (``prepare_mm``).
"""

from mmengine.runner.checkpoint import CheckpointLoader

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.mm.compat import prepare_mm
from vmamba_mm.zoo import SCHEME

PREFIXES = ('', 'file://', 'http://', 'https://', SCHEME)


def register(weights='auto'):
    """Register the loader; ``weights`` as in ``read_checkpoint``.

    Which model the weights go to is not known here: they keep their places.
    """

    def load_from_vmamba_mm(filename, map_location=None):
        return read_checkpoint(filename, weights, map_location, keep_places=True)

    CheckpointLoader.register_scheme(PREFIXES, load_from_vmamba_mm, force=True)


prepare_mm()
register()
