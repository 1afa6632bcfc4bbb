"""Cobra (arXiv 2403.14520): a Mamba that sees. Vision towers, a projector and a language model, for
mmengine's Runner and for chats."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel, ModuleList
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from vmamba_mm.checkpoints.compare import differences
from vmamba_mm.checkpoints.files import fetch
from vmamba_mm.checkpoints.formats import read_content
from vmamba_mm.errors import UserError
from vmamba_mm.families.cobra import LANGUAGE, PROJECTOR
from vmamba_mm.heads.tokenizers import Tokenizer, encode_turns, make_tokenizer, prompt_of
from vmamba_mm.heads.towers import VisionTower
from vmamba_mm.layers import Projector
from vmamba_mm.models import CausalLM
from vmamba_mm.models.generation import generate
from vmamba_mm.registry import MODELS

#: Which parts a stage trains.
STAGES = {'align': ('projector',), 'finetune': ('projector', 'language_model')}
MODES = 'tensor', 'loss', 'predict'


@MODELS.register_module()
class ConversationPreprocessor(BaseDataPreprocessor):
    """Puts images on the device, from 0 to 1; conversations become tokens in the model."""

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: ``inputs``, a list of (3, H, W) in uint8, or None of a text alone, and
                ``data_samples``.
        """
        data = self.cast_data(data)
        images = [None if x is None or x.numel() == 0 else
                  x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in data['inputs']]
        return dict(inputs=images, data_samples=data.get('data_samples'))


@MODELS.register_module()
class Cobra(BaseModel):
    """Images and text to text.

    The features of the towers lie side by side, the projector makes vectors of them, and these
    stand before the text: to the language model an image is the beginning of what it reads, and
    afterwards a state of a fixed size.

    Args:
        towers: configs of :class:`VisionTower`, in the order of the features; all have as many
            tokens.
        language_model: config of a :class:`vmamba_mm.models.CausalLM`, or a checkpoint that
            ``CausalLM.from_pretrained`` takes.
        tokenizer: 'byte', or the path of a ``tokenizer.json``.
        projector: ``kind`` of :class:`vmamba_mm.layers.Projector`.
        projector_side: its ``side``.
        stage: what is trained: 'finetune' (published) the projector and the language model, 'align'
            the projector alone. The towers never are.
        max_length: tokens of a text, of which a longer one loses its end; the image does not count.
        generation: arguments of :func:`vmamba_mm.models.generation.generate` in a test:
            ``max_new_tokens`` (256), ``temperature`` (0, the likeliest token), ``top_k``,
            ``top_p``.
        data_preprocessor: config of a :class:`ConversationPreprocessor`, its type by default.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` loads projector and language model of
            an official file.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    def __init__(self, towers: Sequence[dict], language_model: dict | str, tokenizer: Any = 'byte',
                 projector: str = 'fused-gelu-mlp', projector_side: int = 14,
                 stage: str = 'finetune', max_length: int = 2048,
                 generation: Mapping[str, Any] | None = None,
                 data_preprocessor: dict | None = None, init_cfg: dict | None = None):
        if stage not in STAGES:
            raise ValueError(f'stage={stage!r} does not exist; choose one of {tuple(STAGES)}')
        preprocessor = dict(type='vmamba_mm.ConversationPreprocessor') | (data_preprocessor or {})
        super().__init__(data_preprocessor=MODELS.build(preprocessor), init_cfg=init_cfg)
        self.towers = ModuleList(VisionTower(**{k: v for k, v in dict(tower).items()
                                                   if k != 'type'}) for tower in towers)
        self.language_model = _make_language_model(language_model)
        dims = sum(tower.embed_dims for tower in self.towers)
        self.projector = Projector(dims, self.language_model.arch['embed_dims'], projector,
                                   projector_side)
        self._tokenizer = tokenizer
        self.stage, self.max_length = stage, max_length
        self.generation = dict(max_new_tokens=256) | dict(generation or {})
        for name in ('projector', 'language_model'):
            self.get_submodule(name).requires_grad_(name in STAGES[stage])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is needed first.

        Raises:
            UserError: if it has more tokens than the language model.
        """
        tokenizer, rows = make_tokenizer(self._tokenizer), self.language_model.vocab_size
        if tokenizer.vocab_size > rows:
            raise UserError(f'the tokenizer has {tokenizer.vocab_size} tokens, and the language '
                            f'model {rows}: take the one that belongs to it')
        return tokenizer

    # --- weights ----------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Load what ``pretrained`` and ``init_cfg`` of the parts and of the whole name."""
        self.towers.init_weights()
        self.language_model.init_weights()
        if self.init_cfg:
            self.load_official(self.init_cfg['checkpoint'])

    @staticmethod
    def is_official(checkpoint: str | os.PathLike) -> bool:
        """Whether a file is one of the authors', which has no towers."""
        content = read_content(fetch(checkpoint))
        model = content.get('model') if isinstance(content, Mapping) else None
        return isinstance(model, Mapping) and {PROJECTOR[1], LANGUAGE[1]} <= set(model)

    def load_official(self, checkpoint: str | os.PathLike) -> None:
        """Load projector and language model of an official file, all of both.

        Args:
            checkpoint: ``latest-checkpoint.pt`` of Cobra, which has no weights of the towers.

        Raises:
            UserError: if it cannot be read, or does not fit.
        """
        content = read_content(fetch(checkpoint))
        projector, language = (_inside(content, keys, checkpoint) for keys in (PROJECTOR, LANGUAGE))
        wrong = differences(self.projector.state_dict(), projector)
        if wrong:
            shown = '; '.join(f'{k} {v}' for k, v in list(wrong.items())[:3])
            raise UserError(f'the projector in {checkpoint} is not that of the model: {shown}')
        language = {k.removeprefix('llm.'): v for k, v in language.items()}
        try:
            self.language_model.load_state_dict(language)
        except UserError as err:
            raise UserError(f'the language model in {checkpoint}: {err}') from err
        self.projector.load_state_dict(projector)

    # --- images and text --------------------------------------------------------------------

    def embed_images(self, images: Tensor) -> Tensor:
        """The vectors (B, M, C) that the language model reads of images (B, 3, H, W), 0 to 1."""
        with torch.no_grad():
            features = torch.cat([tower(images) for tower in self.towers], dim=-1)
        return self.projector(features.to(next(self.projector.parameters()).dtype))

    def forward(self, inputs: Sequence[Tensor | None], data_samples: Sequence | None = None,
                mode: str = 'tensor'):
        """
        Args:
            inputs: images (3, H, W) from 0 to 1 of one size, or None of a text alone.
            data_samples: each with ``turns``, pairs of a question and its answer.
            mode: 'loss' for a dict of losses, 'predict' for the samples with ``pred_text``, the
                answer to the last question after the true answers to those before; 'tensor' for
                the vectors of the images alone.
        """
        if mode == 'tensor':
            return self.embed_images(torch.stack(list(inputs)))
        if mode == 'loss':
            return self.losses(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        raise ValueError(f'mode={mode!r} does not exist; choose one of {MODES}')

    def losses(self, inputs: Sequence[Tensor | None], data_samples: Sequence) -> dict[str, Tensor]:
        """The loss of the answers alone, the mean over their tokens, and how many of these were
        the likeliest, in percent."""
        encoded = [encode_turns(self.tokenizer, sample.turns) for sample in data_samples]
        encoded = [(tokens[:self.max_length], labels[:self.max_length])
                   for tokens, labels in encoded]
        embeds, places = self._embed(inputs, [tokens for tokens, _ in encoded])
        length = embeds.shape[1]
        targets = torch.full((len(encoded), length), -100, device=embeds.device)
        for row, start, (_, labels) in zip(targets, places, encoded, strict=True):
            row[start:start + len(labels)] = torch.tensor(labels, device=row.device)
        logits = self.language_model(None, embeds=embeds)[:, :-1]
        is_answer = targets[:, 1:] != -100
        if not is_answer.any():
            return dict(loss=logits.float().sum() * 0)
        logits, targets = logits[is_answer].float(), targets[:, 1:][is_answer]
        return dict(loss=F.cross_entropy(logits, targets),
                    accuracy=(logits.argmax(-1) == targets).float().mean() * 100)

    def _embed(self, inputs, texts):
        """Images before texts, (B, L, C) with zeros behind what is shorter, which a causal model
        does not see, and where each text begins."""
        shown = [i for i, image in enumerate(inputs) if image is not None]
        images = {}
        if shown:
            images = dict(zip(shown, self.embed_images(torch.stack([inputs[i] for i in shown])),
                              strict=True))
        rows = []
        for i, tokens in enumerate(texts):
            device = self.language_model.token_embed.weight.device
            row = self.language_model.token_embed(torch.tensor(tokens, device=device).long())
            rows.append(torch.cat([images[i].to(row.dtype), row]) if i in images else row)
        if not shown and self.training:
            # All parts have a gradient in each step, as several GPUs want it.
            side, weight = self.towers[0].image_size, next(self.projector.parameters())
            blank = self.embed_images(weight.new_zeros(1, 3, side, side))
            rows[0] = rows[0] + 0 * blank.sum()
        starts = [len(row) - len(tokens) for row, tokens in zip(rows, texts, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), starts

    @torch.no_grad()
    def predict(self, inputs: Sequence[Tensor | None], data_samples: Sequence | None) -> list:
        """The samples with ``pred_text``."""
        samples = list(data_samples or [BaseDataElement() for _ in inputs])
        for image, sample in zip(inputs, samples, strict=True):
            chat = Chat(self, image)
            *before, (question, _) = sample.turns
            for turn in before:
                chat.tell(*turn)
            sample.set_field(chat.ask(question), 'pred_text', field_type='metainfo')
        return samples

    def chat(self, image: Tensor | None = None) -> 'Chat':
        """A conversation about an image (3, H, W), from 0 to 1, or about none."""
        return Chat(self, image)


class Chat:
    """A conversation, of which the language model's state is all that is kept.

    Args:
        model: :class:`Cobra`.
        image: (3, H, W), from 0 to 1, or None.
    """

    @torch.no_grad()
    def __init__(self, model: Cobra, image: Tensor | None = None):
        self.model, self.is_first = model, True
        self.state = model.language_model.init_state(1)
        #: Tokens that were said and not yet read.
        self.unread: list[int] = []
        if image is not None:
            embeds = model.embed_images(image[None])
            embeds = embeds.to(model.language_model.token_embed.weight.dtype)
            _, self.state = model.language_model(None, self.state, 1, embeds=embeds)

    def tell(self, question: str, answer: str) -> None:
        """Add a turn that somebody else has written."""
        tokens, _ = encode_turns(self.model.tokenizer, [(question, answer)])
        if not self.is_first:
            tokens = self.model.tokenizer.encode('\n') + tokens
        self.is_first, self.unread = False, [*self.unread, *tokens]

    @torch.no_grad()
    def ask(self, question: str, stream: Callable[[str], Any] | None = None, **options) -> str:
        """The answer to a question.

        Args:
            question: text.
            stream: called with each new piece of the answer as it comes.
            options: arguments of :func:`vmamba_mm.models.generation.generate`, in place of the
                model's ``generation``.
        """
        model, tokenizer = self.model, self.model.tokenizer
        prompt = [*self.unread, *tokenizer.encode(prompt_of(question, self.is_first))]
        self.is_first = False
        device = model.language_model.token_embed.weight.device
        options = {'eos_token_id': tokenizer.end, **model.generation, **options}
        writer = _Writer(tokenizer, stream)
        started = _Started(model.language_model, self.state)
        text = generate(started, torch.tensor([prompt], device=device), callback=writer,
                        **options)[0]
        # The last token was drawn and not read; one that ran into the limit has no end.
        self.state = started.last
        self.unread = text[-1:].tolist() if len(text) > len(prompt) else []
        if self.unread != [tokenizer.end]:
            self.unread.append(tokenizer.end)
        writer.finish()
        return writer.text


class _Started:
    """A language model whose first state is that after an image and what was said: what
    :func:`vmamba_mm.models.generation.generate` calls. It keeps the last state."""

    def __init__(self, model: CausalLM, state: Any):
        self.model, self.first, self.vocab_size = model, state, model.vocab_size
        self.last = state

    def init_state(self, batch: int) -> Any:
        return self.first

    def __call__(self, input_ids: Tensor, state: Any, logits_to_keep: int = 0):
        logits, self.last = self.model(input_ids, state, logits_to_keep)
        return logits, self.last


class _Writer:
    """Text of tokens, of which those are held back that do not make whole characters yet."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], Any] | None):
        self.tokenizer, self.stream, self.tokens, self.text = tokenizer, stream, [], ''

    def __call__(self, tokens: Tensor) -> None:
        self.tokens.append(int(tokens[0]))
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith('\ufffd'):
            self._write(text)

    def finish(self) -> None:
        self._write(self.tokenizer.decode(self.tokens))

    def _write(self, text):
        new, self.text = text[len(self.text):], text
        if new and self.stream is not None:
            self.stream(new)


def _make_language_model(spec: dict | str) -> CausalLM:
    if not isinstance(spec, Mapping):
        return CausalLM.from_pretrained(spec)
    spec = {k: v for k, v in spec.items() if k != 'type'}
    if 'checkpoint' in spec:
        return CausalLM.from_pretrained(**spec)
    return CausalLM(**spec)


def _inside(content: Any, keys: Sequence[str], checkpoint: Any) -> dict[str, Tensor]:
    """The weights of a part of an official file."""
    for i, key in enumerate(keys):
        if not isinstance(content, Mapping) or key not in content:
            raise UserError(f'{checkpoint} holds nothing under {".".join(keys[:i + 1])}, where '
                            'the checkpoints of Cobra have it')
        content = content[key]
    return dict(content)
