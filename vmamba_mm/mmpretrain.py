"""The published classifiers in mmpretrain's hub: ``import vmamba_mm.mmpretrain``.

After it ``mmpretrain.list_models('vmamba')`` names them and ``mmpretrain.get_model(name,
pretrained=...)`` builds them, beside any release of transformers.
"""

from pathlib import Path

from vmamba_mm.compat import prepare_mm, require_working
from vmamba_mm.links import follow

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmpretrain import ModelHub  # noqa: E402

_CONFIGS = follow(Path(__file__).parent / '.mim' / 'configs')

# mmpretrain refuses a name that it has, and importlib.reload runs this again.
if not ModelHub.has('vmamba-tiny-s1l8_8xb128_in1k-224'):
    ModelHub.register_model_index(_CONFIGS / 'imagenet' / 'metafile.yml',
                                  config_prefix=_CONFIGS.parent)
