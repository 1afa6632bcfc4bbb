"""CausalLM: its numbers, decoding from a state, generation, and the files of others.

The generic tests of families (tests/specs.py) feed images and ask for maps, norms of outputs and
stages; what a language model has of that is tested here.
"""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.mamba_lm import FAMILY, arch_of_config
from vmamba_mm.models import CausalLM
from vmamba_mm.models.generation import sample
from vmamba_mm.registry import MODELS

TINY = dict(mixer='mamba', vocab_size=29, embed_dims=16, depth=3, d_state=4)
#: Every option at a value of its own.
OTHER = dict(TINY, d_conv=3, expand=1.5, dt_rank=2, conv_bias=False, bias=True,
             tie_embeddings=False, pad_vocab_size_multiple=1)
each_arch = pytest.mark.parametrize('arch', [TINY, OTHER], ids=['tiny', 'other'])
each_device = pytest.mark.parametrize('device', ['cpu', 'cuda'])


def random_model(arch=TINY, **kwargs):
    """Every parameter is random, and logits differ enough to tell tokens apart."""
    torch.manual_seed(0)
    model = CausalLM(arch, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens_of(*shape, vocab_size=29, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# -- numbers -------------------------------------------------------------------------------------

#: Of transformers 5.24.0 (MambaForCausalLM, its path in plain PyTorch): the logits after the last
#: of the tokens below, of a model whose parameters, in the order of their names there, are
#: 0.8 sin(0.7 n + i + 1) for the n-th element of the i-th.
TRANSFORMERS_LOGITS = [
    [0.523053, -0.576114, 0.075286, 0.497923, -0.592418, 0.117348, 0.470542, -0.606043,
     0.15888, 0.441034, -0.616928, 0.199693, 0.409531, -0.625023, 0.239604, 0.376176],
    [-0.083924, -0.176569, 0.267305, -0.101047, -0.162359, 0.26967, -0.117714, -0.147415,
     0.270816, -0.133848, -0.131804, 0.270737, -0.149377, -0.115598, 0.269434, -0.16423]]


def transformers_state(model):
    """Its weights by the names of transformers, which leaves a tied head out."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith('blocks.'):
            name = f'backbone.layers.{name.removeprefix("blocks.")}'
        name = {'token_embed.weight': 'backbone.embeddings.weight',
                'norm.weight': 'backbone.norm_f.weight'}.get(name, name)
        if name != 'lm_head.weight' or not model.is_tied:
            state[name] = value
    return state


def mamba_ssm_state(model):
    state = {name.replace('.embeddings.', '.embedding.'): value
             for name, value in transformers_state(model).items()}
    return state | {'lm_head.weight': model.lm_head.weight.detach()}


def test_logits_are_those_of_transformers():
    model = CausalLM(mixer='mamba', vocab_size=16, embed_dims=12, depth=2, d_state=5, dt_rank=3)
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(transformers_state(model).items())):
            n = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.8 * torch.sin(0.7 * n + i + 1)).reshape(parameter.shape))
        logits = model((torch.arange(14) * 5 % 16).reshape(2, 7))
    torch.testing.assert_close(logits[:, -1], torch.tensor(TRANSFORMERS_LOGITS),
                               atol=2e-6, rtol=1e-5)


def by_hand(model, input_ids):
    """The model written out from the paper, a token at a time: logits (L, V) in fp64."""
    w = {k: v.detach().double() for k, v in model.state_dict().items()}
    window, rank = w['blocks.0.mixer.conv1d.weight'].shape[-1], w['blocks.0.mixer.dt_proj.weight']
    rank = rank.shape[1]

    def norm(x, name):
        return x / (x.square().mean() + 1e-5).sqrt() * w[f'{name}.weight']

    def linear(x, name):
        return w[f'{name}.weight'] @ x + w.get(f'{name}.bias', 0)

    logits, states = [], {}
    for token in input_ids:
        x = w['token_embed.weight'][token]
        for i in range(len(model.blocks)):
            name = f'blocks.{i}.mixer'
            A = -w[f'{name}.A_log'].exp()
            dim, d_state = A.shape
            last, h = states.get(i, (torch.zeros(dim, window).double(), torch.zeros_like(A)))
            u, z = linear(norm(x, f'blocks.{i}.norm'), f'{name}.in_proj').split(dim)
            last = torch.cat([last[:, 1:], u[:, None]], 1)
            u = (last * w[f'{name}.conv1d.weight'][:, 0]).sum(1) + w.get(f'{name}.conv1d.bias', 0)
            u = F.silu(u)
            dt, B, C = linear(u, f'{name}.x_proj').split([rank, d_state, d_state])
            dt = F.softplus(linear(dt, f'{name}.dt_proj'))
            h = (dt[:, None] * A).exp() * h + (dt * u)[:, None] * B
            y = (h @ C + w[f'{name}.D'] * u) * F.silu(z)
            states[i] = last, h
            x = x + linear(y, f'{name}.out_proj')
        logits.append(w['lm_head.weight'] @ norm(x, 'norm'))
    return torch.stack(logits)


@each_arch
def test_logits_are_those_of_the_paper(arch):
    model, input_ids = random_model(arch), tokens_of(2, 21)
    expected = torch.stack([by_hand(model, row) for row in input_ids])
    torch.testing.assert_close(model(input_ids).double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model.double()(input_ids), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize('name, count', [
    ('mamba-130m', 129_135_360), ('mamba-370m', 371_516_416), ('mamba-790m', 793_204_224),
    ('mamba-1.4b', 1_372_178_432), ('mamba-2.8b', 2_768_345_600)])
def test_published_sizes(name, count):
    with torch.device('meta'):
        model = CausalLM(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(1, 2, dtype=torch.long, device='meta')).shape == (1, 2, 50280)
    assert infer_arch(model.state_dict()) == name


def test_initial_weights_are_as_published():
    """What feeds the residual stream starts smaller by the root of the number of blocks."""
    torch.manual_seed(0)
    model = CausalLM(TINY, embed_dims=64, depth=9, bias=True)
    assert 0.018 < model.token_embed.weight.std() < 0.022
    for block in model.blocks:
        largest = block.mixer.out_proj.weight.abs().max()
        bound = block.mixer.out_proj.in_features ** -0.5 / 3
        assert 0.95 * bound < largest <= bound
        assert block.mixer.in_proj.bias.count_nonzero() == 0
        dt = F.softplus(block.mixer.dt_proj.bias)
        assert dt.min() > 0.9e-3 and dt.max() < 0.11


def test_training_reaches_every_parameter_and_with_cp_changes_nothing():
    input_ids = tokens_of(2, 13)
    grads = []
    for with_cp in (False, True):
        model = random_model(OTHER, with_cp=with_cp).train()
        loss = F.cross_entropy(model(input_ids[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(g.count_nonzero() for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)


@pytest.mark.parametrize('autocast', [False, True], ids=['bf16', 'autocast'])
def test_half_precision_keeps_the_residual_stream_in_fp32(autocast):
    model, input_ids = random_model(), tokens_of(2, 17)
    expected, residuals = model(input_ids), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: residuals.append(out[1].dtype))
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            logits, (with_state, _) = model(input_ids), model(input_ids, model.init_state(2))
    else:
        model.bfloat16()
        logits, (with_state, _) = model(input_ids), model(input_ids, model.init_state(2))
    assert logits.dtype == with_state.dtype == torch.bfloat16
    assert set(residuals) == {torch.float32}
    for found in (logits, with_state):
        error = (found.float() - expected).square().mean().sqrt()
        assert error < 0.03 * expected.square().mean().sqrt()


# -- the state -----------------------------------------------------------------------------------

@each_arch
@each_device
@pytest.mark.parametrize('parts', [[1] * 12, [5, 7], [9, 1, 1, 1], [2, 1, 9], [12]])
def test_pieces_are_the_whole(arch, parts, device):
    """Whatever pieces a text is read in: shorter than the convolution, or a token alone."""
    model, input_ids = random_model(arch).to(device), tokens_of(2, 12).to(device)
    state, logits = model.init_state(2), []
    with torch.no_grad():
        for piece in input_ids.split(parts, dim=1):
            before = [leaf.clone() for leaf in tree_leaves(state)]
            found, new = model(piece, state)
            torch.testing.assert_close(tree_leaves(state), before, atol=0, rtol=0)  # unchanged
            logits, state = [*logits, found], new
        torch.testing.assert_close(torch.cat(logits, 1), model(input_ids), atol=2e-5, rtol=2e-5)
        kept, _ = model(input_ids, model.init_state(2), logits_to_keep=3)
        torch.testing.assert_close(kept, model(input_ids)[:, -3:], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(model(input_ids, logits_to_keep=1), kept[:, -1:])


def test_gradients_go_through_the_state():
    """Truncated backpropagation is the user's choice, who may detach the state."""
    model, input_ids = random_model(), tokens_of(1, 10)
    model(input_ids)[:, 6:].square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _, state = model(input_ids[:, :6], model.init_state(1))
    model(input_ids[:, 6:], state)[0].square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected,
                               atol=2e-5, rtol=2e-4)


def test_hooks_see_every_module_in_decoding():
    """So that adapters and quantised layers work there as well."""
    model, seen = random_model(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(tokens_of(1, 1), model.init_state(1))
    used = {name for name, _ in model.named_modules()
            if 'drop_path' not in name and name != 'blocks'}
    assert seen >= used


# -- generation ----------------------------------------------------------------------------------

def greedy(model, prompt, count):
    """By a full pass for every token."""
    text = prompt
    for _ in range(count):
        logits = model(text[None])[0, -1, :model.vocab_size]
        text = torch.cat([text, logits.argmax()[None]])
    return text


@each_arch
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


def test_every_token_costs_the_same():
    """The tensors of the third token are as many and as large as those of the 60th."""
    model, steps = random_model(), []
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


# -- architectures -------------------------------------------------------------------------------

def test_ways_to_name_an_architecture():
    small = CausalLM(**TINY)
    assert small.arch == CausalLM(TINY).arch == TINY
    assert CausalLM(TINY, depth=1).arch == dict(TINY, depth=1)
    built = MODELS.build(dict(type='vmamba_mm.CausalLM', arch='mamba-130m', embed_dims=16, depth=1,
                              vocab_size=9))
    assert built.arch == dict(mixer='mamba', vocab_size=9, embed_dims=16, depth=1)
    assert built.token_embed.weight.shape == (16, 16)  # 9 tokens, to the next multiple of 8


@pytest.mark.parametrize('changes, message', [
    (dict(mixer='mamba9'), "arch.'mixer'.='mamba9' is not allowed; it must be 'mamba'"),
    (dict(vocab_size=0), 'vocab_size.*an int of at least 1'),
    (dict(depth=True), 'depth.*an int of at least 1'),
    (dict(d_conv=1), 'd_conv.*an int of at least 2'),
    (dict(expand=0), 'expand.*a number above 0'),
    (dict(expand=0.01), 'expand.*no channel.*at least 1/16'),
    (dict(dt_rank='full'), "dt_rank.*'auto' or an int"),
    (dict(tie_embeddings=1), 'tie_embeddings.*True or False'),
    (dict(norm_eps=0), 'norm_eps.*above 0'),
    (dict(positions=True), r"unknown keys \['positions'\]")])
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        CausalLM(**{**TINY, **changes})


def test_a_name_that_does_not_exist():
    with pytest.raises(ValueError, match="arch='mamba-3b' does not exist; choose one of .*130m"):
        CausalLM('mamba-3b')
    with pytest.raises(ValueError, match='lacks .*embed_dims'):
        CausalLM(mixer='mamba')


# -- files ---------------------------------------------------------------------------------------

MAMBA_SSM = dict(d_model=16, n_layer=3, vocab_size=29, ssm_cfg=dict(d_state=4), rms_norm=True,
                 residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
TRANSFORMERS = dict(
    architectures=['MambaForCausalLM'], model_type='mamba', hidden_size=16, num_hidden_layers=3,
    vocab_size=29, state_size=4, conv_kernel=3, expand=1.5, time_step_rank=2, use_bias=True,
    use_conv_bias=False, layer_norm_epsilon=1e-5, tie_word_embeddings=False, hidden_act='silu')


def write(folder, model, layout):
    """A folder as the two libraries write it."""
    if layout == 'mamba_ssm':
        torch.save(mamba_ssm_state(model), folder / 'pytorch_model.bin')
        (folder / 'config.json').write_text(json.dumps(MAMBA_SSM))
        return folder / 'pytorch_model.bin'
    save_file(transformers_state(model), folder / 'model.safetensors', dict(format='pt'))
    (folder / 'config.json').write_text(json.dumps(TRANSFORMERS))
    return folder / 'model.safetensors'


@pytest.mark.parametrize('arch, layout', [(TINY, 'mamba_ssm'), (OTHER, 'transformers')])
def test_folders_of_others(tmp_path, arch, layout):
    model, input_ids = random_model(arch), tokens_of(1, 9)
    file = write(tmp_path, model, layout)
    (tmp_path / 'alone').mkdir()
    alone = file.rename(tmp_path / 'alone/weights.bin')
    alone.with_name('copy').write_bytes(alone.read_bytes())
    file.write_bytes(alone.read_bytes())
    for source in (tmp_path, file, alone):
        found = CausalLM.from_pretrained(source)
        assert not found.training and found.is_tied == (arch is TINY)
        # Alone it does not tell how many rows of the embedding are tokens.
        assert found.arch == (dict(arch, vocab_size=32) if source is alone and arch is TINY
                              else arch)
        assert (found(input_ids) == model(input_ids)).all()
    other = CausalLM(arch)
    other.load_pretrained(file)
    assert (other(input_ids) == model(input_ids)).all()
    other = MODELS.build(dict(type='vmamba_mm.CausalLM', arch=arch,
                              init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path))))
    other.init_weights()
    assert (other(input_ids) == model(input_ids)).all()


@each_arch
@pytest.mark.parametrize('names', [transformers_state, mamba_ssm_state, CausalLM.state_dict])
def test_names_of_weights(arch, names, tmp_path):
    model = random_model(arch)
    state = {k: v.clone() for k, v in names(model).items()}
    assert family_of(state) is FAMILY
    other = CausalLM(arch)
    other.load_state_dict(state)
    for (name, found), expected in zip(other.state_dict().items(), model.state_dict().values(),
                                       strict=True):
        assert torch.equal(found, expected), name
    assert (other.lm_head.weight is other.token_embed.weight) == model.is_tied
    torch.save(state, tmp_path / 'a.pth')
    back = to_official(read_checkpoint(tmp_path / 'a.pth')['state_dict'])
    expected = mamba_ssm_state(model)
    if names is transformers_state and model.is_tied:
        del expected['lm_head.weight']
    assert set(back) == set(expected) and all(torch.equal(back[k], expected[k]) for k in back)


def test_any_name_more_or_less_is_no_longer_recognised():
    for names in (transformers_state, mamba_ssm_state, CausalLM.state_dict):
        model = random_model()
        state = names(model)
        place = {value.data_ptr(): name for name, value in state.items()
                 if name != 'lm_head.weight'}
        for name in FAMILY.signature:
            missing = place[model.get_parameter(name).data_ptr()]
            assert family_of({k: v for k, v in state.items() if k != missing}) is None
        for more in ('more.weight', 'backbone.more.weight', 'patch_embed.proj.weight'):
            assert family_of(state | {more: torch.ones(1)}) is None


def test_a_tied_head_stays_tied():
    """Through everything that makes new parameters."""
    model, other = random_model(), CausalLM(TINY)
    other.load_state_dict(model.state_dict(), assign=True)
    assert other.lm_head.weight is other.token_embed.weight is not model.token_embed.weight
    for changed in (copy.deepcopy(model), model.double(), pickle.loads(pickle.dumps(model))):
        assert changed.lm_head.weight is changed.token_embed.weight
    names = [name for name, _ in model.named_parameters()]
    assert 'lm_head.weight' not in names and 'token_embed.weight' in names


def test_an_untied_head_is_never_taken_for_a_tied_one(tmp_path):
    model = random_model(dict(TINY, tie_embeddings=False))
    state = mamba_ssm_state(model)
    torch.save(state, tmp_path / 'a.pth')
    assert not CausalLM.from_pretrained(tmp_path / 'a.pth').is_tied
    for load in (lambda: CausalLM(TINY).load_pretrained(tmp_path / 'a.pth'),
                 lambda: CausalLM(TINY).load_state_dict(state)):
        with pytest.raises(UserError, match='lm_head.weight differs from the embedding: give the '
                                            'model tie_embeddings=False'):
            load()
    torch.save(transformers_state(random_model()), tmp_path / 'tied.pth')
    with pytest.raises(UserError, match='lm_head.weight is missing'):
        CausalLM(TINY, tie_embeddings=False).load_pretrained(tmp_path / 'tied.pth')


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    model = random_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = mamba_ssm_state(random_model())
    cases = [
        ({k: v for k, v in state.items() if 'layers.1.mixer.D' not in k},
         'blocks.1.mixer.D is missing'),
        (state | {'backbone.layers.0.mixer.more': torch.ones(1)},
         'blocks.0.mixer.more is not in the model'),
        (mamba_ssm_state(random_model(dict(TINY, depth=2))), "holds the arch {.*'depth': 2"),
        (mamba_ssm_state(random_model(dict(TINY, embed_dims=32))), "'embed_dims': 32"),
        ({'net.weight': torch.ones(2)}, 'has no weights that begin with')]
    for wrong, message in cases:
        torch.save(wrong, tmp_path / 'a.pth')
        with pytest.raises(UserError, match=message):
            model.load_pretrained(tmp_path / 'a.pth')
    for wrong, message in cases[:2]:
        with pytest.raises(UserError, match=message):
            model.load_state_dict(wrong)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save(cases[0][0], tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text(json.dumps(MAMBA_SSM))
    with pytest.raises(UserError, match='a.pth|blocks.1.mixer.D is missing'):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize('config, message', [
    (dict(MAMBA_SSM, ssm_cfg=dict(layer='Mamba2')), "ssm_cfg.layer is 'Mamba2'"),
    (dict(MAMBA_SSM, attn_layer_idx=[1]), r'attn_layer_idx is \[1\]'),
    (dict(MAMBA_SSM, d_intermediate=64), 'd_intermediate is 64'),
    (dict(MAMBA_SSM, rms_norm=False), 'rms_norm is False'),
    (dict(TRANSFORMERS, hidden_act='gelu'), "hidden_act is 'gelu'"),
    # The same names of weights, and norms without weights inside the mixer.
    (dict(TRANSFORMERS, model_type='falcon_mamba'), r'another kind \(falcon_mamba\)'),
    (dict(vocab_size=3), 'another kind .no model_type'),
    (dict(d_model=16), "lacks 'n_layer'"),
    (dict(MAMBA_SSM, vocab_size='all'), 'vocab_size.*an int'),
    (['list'], 'cannot be used'), (None, 'cannot be used')])
def test_configs_of_other_models(tmp_path, config, message):
    write(tmp_path, random_model(), 'mamba_ssm')
    (tmp_path / 'config.json').write_text('{' if config is None else json.dumps(config))
    with pytest.raises(UserError, match=message) as info:
        CausalLM.from_pretrained(tmp_path)
    assert 'config.json' in str(info.value) and '\n' not in str(info.value)


def test_published_configs_give_published_architectures():
    ours = dict(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg={}, rms_norm=True,
                residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
    # Those whose names end with -hf have keys of mamba_ssm besides.
    theirs = dict(model_type='mamba', d_model=768, n_layer=24, ssm_cfg={}, hidden_size=768,
                  pad_vocab_size_multiple=8, num_hidden_layers=24, vocab_size=50280,
                  state_size=16, conv_kernel=4, expand=2, time_step_rank=48, use_bias=False,
                  use_conv_bias=True, layer_norm_epsilon=1e-5, hidden_act='silu')
    assert arch_of_config(ours) == arch_of_config(theirs) == FAMILY.archs['mamba-130m']


# -- compiling -----------------------------------------------------------------------------------

def test_export():
    model, ids = random_model(), tokens_of(2, 9)
    length = torch.export.Dim('length', min=2, max=1000)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},)).module()
    for length in (9, 30):
        ids = tokens_of(2, length)
        torch.testing.assert_close(program(ids), model(ids))


def test_one_graph_for_a_text_and_for_a_step():
    torch._dynamo.reset()
    model = random_model()
    ids = tokens_of(2, 9)
    whole = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(whole(ids), model(ids))
    step = torch.compile(lambda ids, state: model(ids, state), backend='eager', fullgraph=True)
    with torch.no_grad():
        state = other = model.init_state(2)
        for seed in range(3):
            ids = tokens_of(2, 1, seed=seed)
            found, state = step(ids, state)
            expected, other = model(ids, other)
            torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
