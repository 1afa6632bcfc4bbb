"""Conversations about images: their files, the steps of a pipeline, how answers are measured."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba_mm.errors import UserError
from vmamba_mm.mm.language.dataset import Conversations, read_turns
from vmamba_mm.mm.language.metrics import AnswerAccuracy
from vmamba_mm.mm.language.transforms import LoadPicture, PackConversation, SquarePicture
from vmamba_mm.registry import DATASETS, METRICS, TRANSFORMS

TALK = [{'from': 'human', 'value': '<image>\nWhat is this?'}, {'from': 'gpt', 'value': 'A cat.'},
        {'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': 'Here.'}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'images').mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 40, 3), np.uint8)).save(tmp_path / 'images/a.png')
    items = [dict(id='1', image='a.png', conversations=TALK), dict(id='2', conversations=TALK[2:])]
    (tmp_path / 'one.json').write_text(json.dumps(items))
    (tmp_path / 'two.json').write_text(json.dumps(items[1:]))
    return tmp_path


def test_files_of_llava(folder):
    steps = [dict(type='vmamba_mm.LoadPicture'), dict(type='vmamba_mm.SquarePicture', size=8),
             dict(type='vmamba_mm.PackConversation')]
    data = DATASETS.build(dict(
        type='vmamba_mm.Conversations', data_root=str(folder), ann_file=['one.json', 'two.json'],
        data_prefix=dict(img_path='images'), pipeline=steps))
    assert len(data) == 3
    first, second = data[0], data[1]
    assert first['inputs'].shape == (3, 8, 8) and first['inputs'].dtype == torch.uint8
    assert second['inputs'] is None
    turns = [('What is this?', 'A cat.'), ('Where?', 'Here.')]
    assert [tuple(turn) for turn in first['data_samples'].turns] == turns
    assert [tuple(turn) for turn in second['data_samples'].turns] == turns[1:]


@pytest.mark.parametrize('content, message', [
    ('[', 'is no JSON file'), ('{}', 'holds a dict, not a list'),
    ('[]', 'there is no conversation'),
    ('[{}]', 'item 0 has no list of conversations'),
    (json.dumps([dict(conversations=TALK[:1])]), 'item 0: the last question has no answer'),
    (json.dumps([dict(conversations=TALK[1:])]), "in turn, each with a value, got one from 'gpt'")])
def test_files_that_are_none(folder, content, message):
    (folder / 'one.json').write_text(content)
    with pytest.raises(UserError, match=message):
        Conversations('one.json', data_root=str(folder))
    with pytest.raises(UserError, match='none.json cannot be read .No such file'):
        Conversations('none.json', data_root=str(folder))


def test_other_speakers():
    talk = [{'from': 'user', 'value': 'Hi'}, {'from': 'assistant', 'value': ' Hello\n'}]
    assert read_turns(talk) == [('Hi', 'Hello')]


def test_squares(folder):
    image = LoadPicture()(dict(img_path=str(folder / 'images/a.png')))['img']
    assert image.shape == (20, 40, 3)
    crop = SquarePicture(20, 'crop')(dict(img=image))['img']
    np.testing.assert_array_equal(crop, image[:, 10:30])
    boxed = SquarePicture(40, 'letterbox', fill=(1, 2, 3))(dict(img=image))['img']
    np.testing.assert_array_equal(boxed[10:30], image)
    assert (boxed[:10] == (1, 2, 3)).all() and (boxed[30:] == (1, 2, 3)).all()
    assert SquarePicture(10)(dict(img=image))['img'].shape == (10, 10, 3)
    with pytest.raises(ValueError, match="way='pad' does not exist"):
        SquarePicture(8, 'pad')
    packed = PackConversation()(dict(img=image))
    assert packed['inputs'].shape == (3, 20, 40) and packed['data_samples'].turns == []
    with pytest.raises(UserError, match='one.json cannot be read as an image'):
        LoadPicture()(dict(img_path=str(folder / 'one.json')))
    assert TRANSFORMS.get('vmamba_mm.LoadPicture') is LoadPicture


def test_answers():
    metric = METRICS.build(dict(type='vmamba_mm.AnswerAccuracy', words=['three', 'seven', 'one']))
    pairs = [('a three and a seven', 'A three and a seven.'), ('a three', 'a seven and a one'),
             ('a seven and a one', 'a seven'), ('nothing', 'a one')]
    for wanted, found in pairs:
        metric.process(None, [dict(turns=[('?', wanted)], pred_text=found)])
    # Of the longer of both: 2 of 2, 0 of 2, 1 of 2, 0 of 1.
    assert metric.compute_metrics(metric.results) == dict(exact=25.0, named=pytest.approx(300 / 7))
    plain = AnswerAccuracy()
    plain.process(None, [dict(turns=[('?', 'Yes')], pred_text='yes')])
    assert plain.compute_metrics(plain.results) == dict(exact=100.0)
