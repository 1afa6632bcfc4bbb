"""A family takes five files: the made-up one has no more, and registering it is enough."""

from pathlib import Path

import pytest
import torch
from specs import SPECS, registered  # noqa: F401 (a fixture)

from vmamba_mm import zoo
from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.families import FAMILIES

made_up = pytest.mark.parametrize('spec', [SPECS['made_up']], ids=['made_up'])
FOLDER = Path(__file__).parent / 'made_up'


def test_five_files():
    files = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob('*')
             if p.is_file() and '__pycache__' not in p.parts}
    assert files == {'family.py', 'model.py', 'spec.py', 'configs/ripple/metafile.yml',
                     'configs/ripple/ripple-nano_in1k-224.py'}
    assert 'ripple' not in FAMILIES and not zoo.entries('ripple')


@made_up
def test_its_config_builds_what_the_metafile_says(spec, read_config):
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS

    entry = zoo.find('ripple/nano')
    assert zoo.config_for('ripple', 'nano', 'cls') == entry.config
    assert zoo.weights_of('vmamba_mm://ripple/nano') == 'https://example.org/ripple_nano.pth'
    with torch.device('meta'):
        model = MODELS.build(read_config(entry.path).model)
    assert type(model.backbone) is spec.model
    assert sum(p.numel() for p in model.parameters()) == entry.parameters


@made_up
def test_its_files_are_converted(spec, tmp_path):
    model = spec.random_model(out_indices=spec.stages(spec.first)[-1:])
    for state in spec.official_classifiers(model, 10):
        torch.save(dict(model=state, epoch=3), tmp_path / 'a.pth')
        checkpoint = read_checkpoint(tmp_path / 'a.pth')
        assert checkpoint['meta'] == dict(epoch=3, weights='model', arch=spec.first,
                                          task='cls')
        assert set(checkpoint['state_dict']) == {'head.fc.weight', 'head.fc.bias', *(
            f'backbone.{k}' for k in model.state_dict())}


@made_up
def test_position_embeddings_of_other_image_sizes(spec, tmp_path):
    """``Backbone.adapt_weights``: what a family changes when it loads."""
    source = spec.random_model()
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    larger = spec.model(dict(spec.first, image_size=32))
    larger.load_pretrained(str(tmp_path / 'a.pth'))
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(larger.eval()(x)[0], source(x)[0], rtol=0.5, atol=0.05)
    assert torch.equal(larger.get_parameter(spec.a_weight), source.get_parameter(spec.a_weight))
