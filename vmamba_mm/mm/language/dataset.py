"""Conversations in the JSON files that LLaVA and its followers are trained on."""

import json
import os
from collections.abc import Sequence
from typing import Any

from mmengine.dataset import BaseDataset

from vmamba_mm.errors import UserError
from vmamba_mm.registry import DATASETS

#: What stands for the image in a text; here it stands before all text.
PLACE = '<image>'
_QUESTIONS, _ANSWERS = ('human', 'user'), ('gpt', 'assistant')


@DATASETS.register_module()
class Conversations(BaseDataset):
    """Questions and answers, about an image each or about none.

    The file is a list of ``{'id': ..., 'image': 'coco/1.jpg', 'conversations': [{'from': 'human',
    'value': '<image>\\\\nWhat is this?'}, {'from': 'gpt', 'value': 'A cat.'}, ...]}``, where
    'image' may be absent.

    Args:
        ann_file: the file, or several, whose lists are put together; relative to ``data_root``.
        data_root: the folder.
        data_prefix: ``dict(img_path=...)``, the folder that images are named from.
        **kwargs: of mmengine's BaseDataset: ``pipeline``, ``test_mode``, ...

    Raises:
        UserError: if a file is missing or broken, or a conversation is no list of questions and
            answers in turn.
    """

    def __init__(self, ann_file: str | Sequence[str], data_root: str = '',
                 data_prefix: dict | None = None, **kwargs):
        self.ann_files = [ann_file] if isinstance(ann_file, str) else list(ann_file)
        super().__init__(ann_file=self.ann_files[0], data_root=data_root,
                         data_prefix=data_prefix or dict(img_path=''), **kwargs)

    def load_data_list(self) -> list[dict]:
        infos = []
        for name in self.ann_files:
            path = name if os.path.isabs(name) else os.path.join(self.data_root or '', name)
            for number, item in enumerate(_read(path)):
                infos.append(self._info(item, f'{path}: item {number}'))
        if not infos:
            raise UserError(f'{", ".join(self.ann_files)}: there is no conversation')
        return infos

    def _info(self, item: Any, place: str) -> dict:
        if not isinstance(item, dict) or not isinstance(item.get('conversations'), list):
            raise UserError(f'{place} has no list of conversations')
        info = dict(turns=read_turns(item['conversations'], place))
        if item.get('image'):
            info['img_path'] = os.path.join(self.data_prefix['img_path'], item['image'])
        return info


def _read(path: str) -> list:
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except OSError as err:
        raise UserError(f'{path} cannot be read ({err.strerror}): put the conversations there, or '
                        'change ann_file= of the data set') from err
    except ValueError as err:
        raise UserError(f'{path} is no JSON file: {err}') from err
    if not isinstance(content, list):
        raise UserError(f'{path} holds a {type(content).__name__}, not a list of conversations')
    return content


def read_turns(messages: Sequence[dict], place: str = 'a conversation') -> list[tuple[str, str]]:
    """Pairs of a question and its answer.

    Args:
        messages: each with 'from' and 'value'.
        place: for messages of errors.

    Raises:
        UserError: if they are not questions and answers in turn.
    """
    turns, question = [], None
    for message in messages:
        speaker, text = (message.get(key) if isinstance(message, dict) else None
                         for key in ('from', 'value'))
        if not isinstance(text, str) or speaker not in (_QUESTIONS if question is None
                                                        else _ANSWERS):
            raise UserError(f'{place}: a conversation is questions (from human) and answers (from '
                            f'gpt) in turn, each with a value, got one from {speaker!r}')
        text = text.replace(PLACE, '').strip()
        if question is None:
            question = text
        else:
            turns.append((question, text))
            question = None
    if question is not None or not turns:
        raise UserError(f'{place}: the last question has no answer')
    return turns
