"""The published classifiers in mmpretrain's hub: ``import vmamba_mm.mmpretrain``.

After it ``mmpretrain.list_models('vmamba')`` names them and ``mmpretrain.get_model(name,
pretrained=...)`` builds them, beside any release of transformers.
"""

import tempfile
from pathlib import Path

import yaml

from vmamba_mm import zoo
from vmamba_mm.mm.compat import prepare_mm, require_working

prepare_mm()  # before mmpretrain, which some releases of transformers break
require_working('mmpretrain')

from mmpretrain import ModelHub  # noqa: E402


def register(entries: list[zoo.Entry]) -> None:
    """Make models known to the hub, which reads a file and takes all that is in it."""
    models = [{'Name': e.name, 'In Collection': e.collection['Name'], 'Config': str(e.path),
               'Weights': e.weights, 'Metadata': {'FLOPs': e.flops, 'Parameters': e.parameters},
               'Results': [{'Task': r.task, 'Dataset': r.dataset, 'Metrics': dict(r.metrics)}
                           for r in e.results]} for e in entries]
    collections = {e.collection['Name']: e.collection for e in entries}
    with tempfile.TemporaryDirectory() as folder:
        metafile = Path(folder, 'metafile.yml')
        metafile.write_text(yaml.safe_dump(
            {'Collections': list(collections.values()), 'Models': models}), encoding='utf-8')
        ModelHub.register_model_index(metafile)


# mmpretrain refuses a name that it has, and importlib.reload runs this again.
register([e for e in zoo.entries(task='cls') if not ModelHub.has(e.name)])
