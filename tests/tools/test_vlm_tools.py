"""train.py, test.py and predict.py on conversations about images, with a small Cobra."""

import json

import numpy as np
import torch
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.mm import cli
from vmamba_mm.paths import CONFIGS

CONFIG = """
_base_ = [{base!r}]
tower = dict(name='vit_tiny_patch16_224', image_size=16, patch_size=8, embed_dim=8, depth=2,
             num_heads=2)
model = dict(
    towers=[dict(**tower), dict(**tower, class_token=False, global_pool='avg')],
    language_model=dict(_delete_=True, mixer='mamba', vocab_size=257, embed_dims=16, depth=1),
    tokenizer='byte', generation=dict(max_new_tokens=4))
load = [dict(type='vmamba_mm.LoadPicture'), dict(type='vmamba_mm.SquarePicture', size=16),
        dict(type='vmamba_mm.PackConversation')]
loader = dict(batch_size=2, num_workers=0, persistent_workers=False,
              dataset=dict(data_root={root!r}, ann_file='talk.json', pipeline=load))
train_dataloader = test_dataloader = loader
max_epochs = 1
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type='ConstantLR', factor=1.0)]
test_evaluator = dict(words=['cat'])
"""


def write_project(folder):
    rng, items = np.random.default_rng(0), []
    for number in range(4):
        image = Image.fromarray(rng.integers(0, 255, (12, 20, 3), np.uint8))
        image.save(folder / f'{number}.png')
        items.append(dict(image=f'{number}.png', conversations=[
            {'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A cat.'}]))
    del items[3]['image']
    (folder / 'talk.json').write_text(json.dumps(items))
    config = folder / 'config.py'
    base = CONFIGS / 'cobra/cobra-3b_8xb16-2e_llava-lvis4v-lrv.py'
    config.write_text(CONFIG.format(base=str(base), root=str(folder)))
    return config


def test_train_and_test(tmp_path, call):
    config = write_project(tmp_path)
    code, out, err = call('train.py', config, '--work-dir', 'work')
    assert code == 0, err[-3000:]
    checkpoint = (tmp_path / 'work/last_checkpoint').read_text().strip()
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert {name.partition('.')[0] for name in state} == {'towers', 'projector', 'language_model'}
    model = cli.build_model(cli.load_config(str(config)))
    assert set(state) == set(model.state_dict())
    code, out, err = call('test.py', config, checkpoint, '--work-dir', 'test', '--out', 'm.json')
    assert code == 0, err[-3000:]
    assert set(json.loads((tmp_path / 'm.json').read_text())) >= {'exact', 'named'}


def test_chat(tmp_path, call):
    config = write_project(tmp_path)
    torch.manual_seed(0)
    model = cli.build_model(cli.load_config(str(config)))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    arguments = 'predict.py', config, 'model.pth', '0.png'
    code, out, err = call(*arguments, '--ask', 'What is this?', 'And why?')
    assert code == 0, err[-3000:]
    assert '0.png: What is this?' in out and '0.png: And why?' in out
    assert '2 answer(s) -> predictions/0.png' in out
    assert Image.open(tmp_path / 'predictions/0.png').width == 640
    code, sampled, err = call(*arguments, '--ask', 'What?', '--temperature', '2')
    assert code == 0, err[-3000:]
    for more, message in (((), 'ask something'),
                          (('--ask', 'What?', '--temperature', '-1'), 'at least 0')):
        assert_one_line(call(*arguments, *more), message)


def test_official_file(tmp_path, call):
    """It has no towers, which keep their own weights."""
    config = write_project(tmp_path)
    torch.manual_seed(0)
    model = cli.build_model(cli.load_config(str(config)))
    language = {f'llm.{k}': v for k, v in model.language_model.state_dict().items()}
    torch.save(dict(model=dict(projector=model.projector.state_dict(), llm_backbone=language)),
               tmp_path / 'latest-checkpoint.pt')
    code, out, err = call('predict.py', config, 'latest-checkpoint.pt', '1.png', '--ask', 'What?',
                          '--cfg-options', 'model.towers.0.pretrained=False',
                          'model.towers.1.pretrained=False')
    assert code == 0, err[-3000:]
    assert '1 answer(s)' in out
