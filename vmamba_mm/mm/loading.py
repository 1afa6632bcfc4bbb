"""mmengine reads checkpoints with ``checkpoints.files.read_checkpoint`` once this is imported.

mmengine's own loaders of files and web addresses can run a pickle's code, and know no official
names. So ``load_from``, ``init_cfg`` of any module and the inferencers take official files, and a
hostile one is refused whichever way it comes. Importing this also lets mmengine find the configs of
packages that it has another name for (``prepare_mm``).

Nothing but importing this, or ``vmamba_mm.mm`` as the tools and the configs' ``custom_imports`` do,
changes mmengine. In a process that has only built ``type='vmamba_mm.VMamba'`` mmengine loads as
ever, and our backbones look after themselves: ``init_cfg=dict(type='Pretrained')`` reads the file
safely and loads all of it or raises, and any ``load_state_dict`` takes official names below the
backbone's place and refuses what does not fit. What is missing there is the safe reading of
``load_from``, and an official classifier, which has no ``backbone.``, is refused with a line that
says what to do.

With it, a file whose only content is a model of one of our families comes under our names. What
lies inside another model keeps its names, as it may be the authors' own; what is of no family is
returned as it was read.
"""

from mmengine.runner.checkpoint import CheckpointLoader

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.mm.compat import prepare_mm
from vmamba_mm.zoo import SCHEME

PREFIXES = ('', 'file://', 'http://', 'https://', SCHEME)


def register(weights='auto', likely=()):
    """Register the loader; arguments as in ``read_checkpoint``.

    Which model the weights go to is not known here: they keep their places.
    """

    def load_from_vmamba_mm(filename, map_location=None):
        return read_checkpoint(filename, weights, map_location, keep_places=True, likely=likely)

    CheckpointLoader.register_scheme(PREFIXES, load_from_vmamba_mm, force=True)


prepare_mm()
register()
