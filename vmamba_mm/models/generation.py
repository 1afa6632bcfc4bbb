"""Text from a language model, one token at a time, from a state that holds all that came before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(model: nn.Module, input_ids: Tensor | Sequence[Tensor], max_new_tokens: int, *,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
             callback: Callable[[Tensor], Any] | None = None,
             generator: torch.Generator | None = None) -> Tensor | list[Tensor]:
    """Continue texts.

    The prompts are read in one pass, each then gives a state, and every further token costs one
    step from it. The state of a scan has a fixed size: time and memory of a token do not depend on
    how many came before. That of attention grows.

    Args:
        model: with ``vocab_size``, ``init_state(batch)`` and ``model(input_ids, state,
            logits_to_keep)``, such as :class:`vmamba_mm.models.CausalLM`.
        input_ids: (B, L), prompts of one length, or a sequence of B prompts (L_i) of any. A prompt
            has at least one token; what stands beside it in a batch does not change its text.
        max_new_tokens: at most so many are added.
        temperature: by which logits are divided before a token is drawn; 0 takes the likeliest.
        top_k: draw among the so many likeliest tokens; None for all.
        top_p: draw among the likeliest tokens that together have at least this probability; None
            for all.
        eos_token_id: the token, or tokens, that end a text.
        pad_token_id: fills the rest of a text that ended before others; None for its last token,
            an end.
        callback: called with the new tokens (B) after each step, such as ``streamer.put`` of a
            streamer of transformers. What it returns ends the generation if it is True.
        generator: of the random numbers.

    Returns:
        Prompts and what was added: (B, L + new) for a tensor; for a sequence a list of (L_i + new),
        each of which ends with its own end.

    Raises:
        ValueError: on a value that is not allowed.
    """
    is_batch = isinstance(input_ids, Tensor)
    prompts = list(input_ids)
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    ends = _ends(eos_token_id, prompts[0].device)
    logits, state = _read_prompts(model, prompts)
    added, is_done = [], torch.zeros(len(prompts), dtype=torch.bool, device=prompts[0].device)
    for step in range(max_new_tokens):
        tokens = sample(logits[:, :model.vocab_size], temperature, top_k, top_p, generator)
        if added:
            rest = added[-1] if pad_token_id is None else pad_token_id
            tokens = torch.where(is_done, rest, tokens)
        added.append(tokens)
        is_done = is_done | torch.isin(tokens, ends)
        if callback is not None and callback(tokens) is True or len(ends) and is_done.all() \
                or step == max_new_tokens - 1:
            break
        logits, state = model(tokens.unsqueeze(1), state, 1)
        logits = logits[:, -1]
    new = torch.stack(added, dim=1) if added else prompts[0].new_empty(len(prompts), 0)
    texts = [torch.cat(pair) for pair in zip(prompts, new, strict=True)]
    if is_batch:
        return torch.stack(texts)
    return [_cut(text, len(prompt), ends) for text, prompt in zip(texts, prompts, strict=True)]


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A token for each row.

    Args:
        logits: (B, V).
        temperature, top_k, top_p, generator: as of :func:`generate`.

    Returns:
        (B).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays if those before it do not have enough; the first one always does.
        is_out = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def _read_prompts(model, prompts):
    """Logits (B, V) of the token after each prompt, and the state there.

    Those of one length are read together. No prompt is padded: a padding token would change the
    state that all later ones start from.
    """
    rows_of: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(len(prompt), []).append(row)
    parts = [model(torch.stack([prompts[row] for row in rows]), model.init_state(len(rows)), 1)
             for rows in rows_of.values()]
    if len(parts) == 1:
        logits, state = parts[0]
        return logits[:, -1], state
    places = torch.tensor([row for rows in rows_of.values() for row in rows],
                          device=prompts[0].device).argsort()
    logits, state = _joined(parts, places)
    return logits[:, -1], state


def _joined(parts, places):
    """Nested tuples of tensors as one, along the first dimension and in this order.

    A state whose size depends on the text has a method ``joined`` that makes them as one.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[places]
    if hasattr(first, 'joined'):
        parts = [first.joined(parts)]
    items = [_joined(group, places) for group in zip(*parts, strict=True)]
    return type(first)(*items) if hasattr(first, '_fields') else type(first)(items)


def _check(prompts, max_new_tokens, temperature, top_k, top_p):
    if not prompts or not all(isinstance(p, Tensor) and p.dim() == 1 and len(p) for p in prompts):
        raise ValueError('input_ids must be a tensor (B, L) or a sequence of tensors (L_i), with '
                         'at least one text and one token in each')
    if max_new_tokens < 0:
        raise ValueError(f'max_new_tokens must be an int of at least 0, got {max_new_tokens!r}')
    if not temperature >= 0:
        raise ValueError(f'temperature must be a number of at least 0, got {temperature!r}')
    if top_k is not None and not top_k >= 1:
        raise ValueError(f'top_k must be None or an int of at least 1, got {top_k!r}')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p must be None or a number above 0 and at most 1, got {top_p!r}')


def _ends(eos_token_id, device):
    ids = [] if eos_token_id is None else eos_token_id
    return torch.tensor([ids] if isinstance(ids, int) else list(ids), device=device,
                        dtype=torch.long)


def _cut(text, start, ends):
    """A text up to its first end after the prompt."""
    places = torch.isin(text[start:], ends).nonzero()
    return text[:start + int(places[0]) + 1] if len(places) else text
