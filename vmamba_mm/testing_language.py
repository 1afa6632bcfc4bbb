"""Runs of language models for tools/check_parity.py, beside those of :mod:`vmamba_mm.testing`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_jamba_mixer(mixer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The Mamba layer of Jamba on 'input' (B, L, C), and its state after the last token,
    'ssm_state_float64'; with an 'attention_mask' (B, L) on the tokens of each row that are not
    padding, and zeros for the others."""
    x = inputs['input']
    if 'attention_mask' in inputs:
        return dict(output=_without_padding(mixer, x, inputs['attention_mask']))
    with torch.no_grad():
        _, state = mixer(x.detach(), mixer.init_state(len(x)))
    return dict(output=mixer(x), ssm_state_float64=state.ssm)


def run_jamba(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A Jamba on 'input' (B, L).

    Returns:
        'output', the logits (B, L, V): of the first 'prefill_length' tokens together and of the
        others one by one, if there is one; of padding, by the 'attention_mask', zeros. Else also
        'hidden_states', the stream after the embedding and each layer, of the last one after the
        norm; and 'router_logits' (tokens, experts) of each mixture.
    """
    tokens = inputs['input']
    if 'prefill_length' in inputs:
        first = inputs['prefill_length']
        logits, state = model(tokens[:, :first], model.init_state(len(tokens)))
        outputs = [logits]
        for token in tokens[:, first:].split(1, dim=1):
            logits, state = model(token, state)
            outputs.append(logits)
        return dict(output=torch.cat(outputs, dim=1))
    if 'attention_mask' in inputs:
        return dict(output=_without_padding(model, tokens, inputs['attention_mask']))
    hidden, scores = [], []
    hooks = [model.token_embed.register_forward_hook(lambda *call: hidden.append(call[-1])),
             model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0])),
             *(block.register_forward_hook(lambda *call: hidden.append(sum(call[-1][:2])))
               for block in model.blocks[:-1]),
             *(module.router.register_forward_hook(lambda *call: scores.append(call[-1]))
               for module in model.modules() if hasattr(module, 'router'))]
    try:
        logits = model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(output=logits, hidden_states=hidden, router_logits=scores)


def _without_padding(function, x: Tensor, mask: Tensor) -> Tensor:
    """``function`` of each row's own tokens, where they are in the row."""
    rows = []
    for row, is_real in zip(x, mask.bool(), strict=True):
        y = function(row[None, is_real])[0]
        rows.append(y.new_zeros(len(row), *y.shape[1:]).index_put((is_real,), y))
    return torch.stack(rows)
