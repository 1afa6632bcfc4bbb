"""Chats about images, for tools/predict.py."""

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.images import sign
from vmamba_mm.mm.inputs import build_steps

WIDTH = 640


class Answerer:
    """The answers to questions about an image, printed as they come, and a picture with all.

    Args:
        model: :class:`vmamba_mm.heads.Cobra`.
        cfg: its config, whose test pipeline reads the file.
        meta: of the data set; nothing of it is needed.
        questions: asked one after the other, as turns of one conversation.
        temperature: by which logits are divided before a token is drawn; 0 for the likeliest, None
            for what the config says.

    Raises:
        UserError: without questions, or on a negative temperature.
    """

    done = 'answered'
    suffixes = ('.png',)

    def __init__(self, model: nn.Module, cfg: Any, meta: Mapping[str, Any],
                 questions: Sequence[str] | None = None, temperature: float | None = None):
        if not questions:
            raise UserError("a model that answers questions needs one: --ask 'What is in the "
                            "picture?'")
        if temperature is not None and temperature < 0:
            raise UserError(f'--temperature must be at least 0, got {temperature:g}')
        self.model, self.steps, self.questions = model, build_steps(cfg), list(questions)
        self.options = {} if temperature is None else dict(temperature=temperature)

    def __call__(self, path: Path, out: Path, place: str) -> str:
        results: dict[str, Any] = dict(img_path=str(path))
        for step in self.steps:
            results = step(results)
        data = self.model.data_preprocessor(dict(inputs=[results['inputs']]))
        with torch.no_grad():
            chat = self.model.chat(data['inputs'][0])
        turns = []
        for question in self.questions:
            print(f'{place} {question}\n  ', end='')
            answer = chat.ask(question, stream=_print_now, **self.options)
            print(flush=True)
            turns.append((question, answer))
        draw_turns(path, turns, out)
        sign(out, path)
        return f'{len(turns)} answer(s)'


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def draw_turns(path: Path, turns: Sequence[tuple[str, str]], out: Path) -> None:
    """Write a picture: the image, and questions and answers below."""
    from PIL import Image, ImageDraw, ImageFont

    with Image.open(path) as opened:
        image = opened.convert('RGB')
    scale = WIDTH / image.width
    way = Image.NEAREST if scale >= 4 else Image.LANCZOS  # pixels of a small one stay visible
    image = image.resize((WIDTH, max(round(scale * image.height), 1)), way)
    lines = [(line, colour) for question, answer in turns
             for text, colour in ((question, (90, 90, 90)), (answer, (0, 0, 0)))
             for line in textwrap.wrap(text, 66) or ['']]
    page = Image.new('RGB', (WIDTH, image.height + 26 * len(lines) + 14), 'white')
    page.paste(image)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    for i, (line, colour) in enumerate(lines):
        draw.text((10, image.height + 6 + 26 * i), line, colour, font)
    page.save(out)
