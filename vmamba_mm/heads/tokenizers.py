"""From text to numbers of tokens and back, for models that read text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vmamba_mm.errors import UserError


class Tokenizer(Protocol):
    """What a model wants of a tokenizer."""

    #: How many tokens there are, and the one that ends a turn.
    vocab_size: int
    end: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, in which ``<|endoftext|>`` is the token ``end``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without ``end``."""


END = '<|endoftext|>'


class ByteTokenizer:
    """The bytes of UTF-8 are the tokens 0 to 255, and 256 is the end; it needs no file."""

    vocab_size, end = 257, 256

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for i, part in enumerate(text.split(END)):
            tokens += [self.end] * (i > 0) + list(part.encode())
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors='replace')


class FileTokenizer:
    """A ``tokenizer.json`` of Hugging Face's, such as that of GPT-NeoX, which Mamba's models have.

    Args:
        path: of the file, or of a folder with it.

    Raises:
        UserError: if it cannot be read, or has no ``<|endoftext|>``, or the package tokenizers is
            not installed.
    """

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer as Read
        except ImportError as err:
            raise UserError(f'{path} needs the package tokenizers: pip install tokenizers') from err
        file = Path(path)
        file = file / 'tokenizer.json' if file.is_dir() else file
        if not file.is_file():
            raise UserError(f'the tokenizer {file} does not exist: give the tokenizer.json of the '
                            "language model, or 'byte'")
        try:
            self.inner = Read.from_file(str(file))
        except Exception as err:
            raise UserError(f'{file} cannot be read as a tokenizer: {err}') from err
        end = self.inner.token_to_id(END)
        if end is None:
            raise UserError(f'{file} has no token {END}, which ends each turn of a chat')
        self.end, self.vocab_size = end, self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode([t for t in tokens if t != self.end], skip_special_tokens=False)


def make_tokenizer(spec: Any) -> Tokenizer:
    """The tokenizer of a config: 'byte', the path of a ``tokenizer.json``, or one itself."""
    if not isinstance(spec, str):
        return spec
    return ByteTokenizer() if spec == 'byte' else FileTokenizer(spec)


# --- conversations --------------------------------------------------------------------------------

def prompt_of(question: str, is_first: bool = True) -> str:
    """What stands before an answer, in the format of Zephyr as Cobra has it since May 2024."""
    return f'{"" if is_first else chr(10)}<|user|>\n{question}{END}\n<|assistant|>\n'


def encode_turns(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], ignore: int = -100
                 ) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and of each the label: itself in an answer and at its end, else
    ``ignore``.

    Args:
        tokenizer: of the model.
        turns: (question, answer), in order.
        ignore: what a loss passes over.
    """
    tokens: list[int] = []
    labels: list[int] = []
    for i, (question, answer) in enumerate(turns):
        asked = tokenizer.encode(prompt_of(question, i == 0))
        said = tokenizer.encode(answer + END)
        tokens += asked + said
        labels += [ignore] * len(asked) + said
    return tokens, labels
