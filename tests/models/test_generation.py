"""Texts from CausalLM, one token at a time."""

import pytest
import torch
from language_models import TINY, each_device, each_model, each_scan, random_model, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmamba_mm.models import CausalLM
from vmamba_mm.models.generation import sample


def greedy(model, prompt, count):
    """By a full pass for every token."""
    text = prompt
    for _ in range(count):
        logits = model(text[None])[0, -1, :model.vocab_size]
        text = torch.cat([text, logits.argmax()[None]])
    return text


@each_model
@each_device
@torch.no_grad()
def test_generation_is_that_of_full_passes(arch, device):
    model = random_model(arch).to(device)
    prompts = [tokens_of(length, seed=length).to(device) for length in (5, 2, 5, 1, 9)]
    expected = [greedy(model, prompt, 11) for prompt in prompts]
    assert len({tuple(text[-11:].tolist()) for text in expected}) > 2  # the test can tell
    # In a batch of many lengths each text is what it is alone.
    for found, text in zip(model.generate(prompts, 11), expected, strict=True):
        assert found.tolist() == text.tolist()
    pair = torch.stack([prompts[0], prompts[2]])
    assert model.generate(pair, 11).tolist() == torch.stack([expected[0], expected[2]]).tolist()
    assert model.generate(pair, 0).tolist() == pair.tolist()


def test_ends_and_what_comes_after_them():
    model = random_model()
    prompts = torch.stack([tokens_of(4, seed=seed) for seed in (1, 2, 3)])
    free = model.generate(prompts, 20)[:, 4:]
    end = int(free[0, 3])
    first = [row.tolist().index(end) if end in row else None for row in free]
    longest = max(20 if i is None else i + 1 for i in first)
    for pad in (None, 28):
        rows = model.generate(prompts, 20, eos_token_id=end, pad_token_id=pad)[:, 4:]
        assert rows.shape[1] == longest  # all have ended, or there were 20 tokens
        for row, whole, i in zip(rows.tolist(), free.tolist(), first, strict=True):
            stop = longest if i is None else i + 1
            assert row[:stop] == whole[:stop]
            assert set(row[stop:]) <= {end if pad is None else pad}
    texts = model.generate(list(prompts), 20, eos_token_id=[end, 1000])
    assert [len(text) - 4 for text in texts] == [20 if i is None else i + 1 for i in first]


def test_callback_gets_every_token_and_may_end_the_text():
    model, prompts, seen = random_model(), tokens_of(2, 3), []
    free = model.generate(prompts, 8, callback=seen.append)
    assert torch.stack(seen, 1).tolist() == free[:, 3:].tolist()
    seen.clear()

    def stop_at_third(tokens):
        seen.append(tokens)
        return len(seen) == 3

    assert model.generate(prompts, 8, callback=stop_at_third).tolist() == free[:, :6].tolist()


def test_drawing():
    """Frequencies are the probabilities, of the tokens that top_k and top_p leave."""
    p = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05])
    rows = p.log().expand(20000, -1)

    def frequencies(**kwargs):
        drawn = sample(rows, generator=torch.Generator().manual_seed(0), **kwargs)
        return torch.bincount(drawn, minlength=5) / len(drawn)

    left = lambda *kept: torch.tensor([p[i] if i in kept else 0 for i in range(5)])  # noqa: E731
    for kwargs, weights in (
            ({}, p), (dict(temperature=2.0), p.sqrt()), (dict(temperature=0.5), p ** 2),
            (dict(top_k=2), left(1, 2)), (dict(top_k=9), p), (dict(top_p=0.69), left(1, 2)),
            (dict(top_p=0.71), left(1, 2, 3)), (dict(top_p=1.0), p), (dict(top_p=1e-6), left(1)),
            (dict(top_k=3, top_p=0.8), left(1, 2))):
        found = frequencies(**kwargs)
        torch.testing.assert_close(found, weights / weights.sum(), atol=0.015, rtol=0)
        assert ((found == 0) == (weights == 0)).all()
    assert (sample(rows[:3], temperature=0) == 1).all()


def test_drawn_texts_can_be_repeated_and_stay_in_the_vocabulary():
    model, prompts = random_model(), tokens_of(2, 3)
    with torch.no_grad():  # rows 29 to 31 are of no token
        model.token_embed.weight[29:] = 30 * model.norm.weight
    texts = [model.generate(prompts, 30, temperature=3.0,
                            generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0].tolist() == texts[1].tolist() != texts[2].tolist()
    assert max(text.max() for text in texts) < 29
    assert model.generate(prompts, 9).max() < 29
    assert model.generate(prompts, 9, temperature=1.0, top_k=1).tolist() == \
        model.generate(prompts, 9).tolist()


class Sizes(TorchDispatchMode):
    """The numbers of elements of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.made += [leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        return result


@each_scan
def test_every_token_costs_the_same(arch):
    """The tensors of the third token are as many and as large as those of the 60th."""
    model, steps = random_model(arch), []
    with Sizes() as sizes:
        def callback(_):
            steps.append(sizes.made)
            sizes.made = []
        model.generate(tokens_of(2, 40), 60, callback=callback)
    assert max(steps[0]) > max(steps[2])  # the prompt was read as a whole
    assert all(step == steps[2] for step in steps[3:])
    states = [tree_leaves(model(tokens_of(2, length), model.init_state(2))[1])
              for length in (3, 300)]
    for few, many in zip(*states, strict=True):
        assert few.shape == many.shape
        # Nor does a state keep the memory of the text that it comes from.
        assert many.untyped_storage().nbytes() == many.numel() * many.element_size()


@pytest.mark.parametrize('kwargs, message', [
    (dict(max_new_tokens=-1), 'max_new_tokens must be an int of at least 0'),
    (dict(temperature=-1.0), 'temperature must be a number of at least 0'),
    (dict(top_k=0), 'top_k must be None or an int of at least 1'),
    (dict(top_p=0.0), 'top_p must be None or a number above 0'),
    (dict(top_p=1.5), 'top_p must be None or a number above 0 and at most 1'),
    (dict(input_ids=[]), 'at least one text'),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), 'one token in each'),
    (dict(input_ids=tokens_of(4)), 'must be a tensor .B, L. or a sequence')])
def test_generate_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(TINY).generate(**{'input_ids': tokens_of(1, 2), 'max_new_tokens': 2, **kwargs})
