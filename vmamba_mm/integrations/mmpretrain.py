"""The published classifiers in mmpretrain's hub: ``import vmamba_mm.mmpretrain``.

After it ``mmpretrain.list_models('vmamba')`` names them and ``mmpretrain.get_model(name,
pretrained=...)`` builds them, beside any release of transformers.
"""

import tempfile
from pathlib import Path

import yaml

from vmamba_mm.links import CONFIGS
from vmamba_mm.mm.compat import prepare_mm, require_working

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmpretrain import ModelHub  # noqa: E402


def _register_classifiers(metafile: Path) -> None:
    """The hub takes a file, and all that is in it; detectors and segmentors are not for it."""
    index = yaml.safe_load(metafile.read_text())
    index['Models'] = [model for model in index['Models']
                       if model['Results'][0]['Task'] == 'Image Classification']
    used = {model['In Collection'] for model in index['Models']}
    index['Collections'] = [c for c in index['Collections'] if c['Name'] in used]
    with tempfile.TemporaryDirectory() as folder:
        classifiers = Path(folder, 'metafile.yml')
        classifiers.write_text(yaml.safe_dump(index, sort_keys=False))
        ModelHub.register_model_index(classifiers, config_prefix=CONFIGS.parent)


# mmpretrain refuses a name that it has, and importlib.reload runs this again.
if not ModelHub.has('vmamba-tiny-s1l8_8xb128_in1k-224'):
    _register_classifiers(CONFIGS / 'vmamba' / 'metafile.yml')
