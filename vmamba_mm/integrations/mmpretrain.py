"""The published classifiers in mmpretrain's hub: ``import vmamba_mm.mmpretrain``.

After it ``mmpretrain.list_models('vmamba')`` names them and ``mmpretrain.get_model(name,
pretrained=...)`` builds them, beside any release of transformers.
"""

from vmamba_mm.links import CONFIGS
from vmamba_mm.mm.compat import prepare_mm, require_working

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmpretrain import ModelHub  # noqa: E402

# mmpretrain refuses a name that it has, and importlib.reload runs this again.
if not ModelHub.has('vmamba-tiny-s1l8_8xb128_in1k-224'):
    ModelHub.register_model_index(CONFIGS / 'vmamba' / 'metafile.yml',
                                  config_prefix=CONFIGS.parent)
