"""CausalLM: its numbers, decoding from a state, and architectures.

The generic tests of families (tests/specs.py) feed images and ask for maps, norms of outputs and
stages; what a language model has of that is tested here, in test_generation.py and in
test_causal_lm_files.py.
"""

import pytest
import torch
import torch.nn.functional as F
from language_models import (
    ATTENTION,
    HYBRID,
    MAMBA2,
    OTHER,
    RWKVS,
    TINY,
    each_arch,
    each_device,
    each_mamba,
    each_with_stream,
    random_model,
    tokens_of,
    transformers_state,
)
from torch.utils._pytree import tree_leaves

from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.models import CausalLM
from vmamba_mm.registry import MODELS

# -- numbers -------------------------------------------------------------------------------------

#: Of transformers 5.24.0 (MambaForCausalLM and Mamba2ForCausalLM, in plain PyTorch): the logits
#: after the last of the tokens below, of a model whose parameters, in the order of their names
#: there, are 0.8 sin(0.7 n + i + 1) for the n-th element of the i-th.
TRANSFORMERS_LOGITS = {
    'mamba': [
        [0.523053, -0.576114, 0.075286, 0.497923, -0.592418, 0.117348, 0.470542, -0.606043,
         0.15888, 0.441034, -0.616928, 0.199693, 0.409531, -0.625023, 0.239604, 0.376176],
        [-0.083924, -0.176569, 0.267305, -0.101047, -0.162359, 0.26967, -0.117714, -0.147415,
         0.270816, -0.133848, -0.131804, 0.270737, -0.149377, -0.115598, 0.269434, -0.16423]],
    'mamba2': [
        [-0.151541, 0.44067, -0.30613, -0.122731, 0.433595, -0.327591, -0.093367, 0.42456,
         -0.347571, -0.06358, 0.413604, -0.36598, -0.033506, 0.400778, -0.382733, -0.00328],
        [-0.065398, 0.606122, -0.564107, -0.020254, 0.585142, -0.587461, 0.024982, 0.561516,
         -0.608159, 0.070105, 0.53535, -0.626107, 0.11491, 0.506764, -0.641224, 0.159197]]}


@pytest.mark.parametrize('options', [
    dict(mixer='mamba', dt_rank=3), dict(mixer='mamba2', head_dim=4, n_groups=2)],
    ids=['mamba', 'mamba2'])
def test_logits_are_those_of_transformers(options):
    model = CausalLM(options, vocab_size=16, embed_dims=12, depth=2, d_state=5)
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(transformers_state(model).items())):
            n = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.8 * torch.sin(0.7 * n + i + 1)).reshape(parameter.shape))
        logits = model((torch.arange(14) * 5 % 16).reshape(2, 7))
    expected = torch.tensor(TRANSFORMERS_LOGITS[options['mixer']])
    torch.testing.assert_close(logits[:, -1], expected, atol=2e-6, rtol=1e-5)


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


@pytest.mark.parametrize('arch', [TINY, OTHER], ids=['tiny', 'other'])
def test_logits_are_those_of_the_paper(arch):
    model, input_ids = random_model(arch), tokens_of(2, 21)
    expected = torch.stack([by_hand(model, row) for row in input_ids])
    torch.testing.assert_close(model(input_ids).double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model.double()(input_ids), expected, atol=1e-7, rtol=1e-7)


@each_mamba
def test_blocks_add_to_a_stream(arch):
    """What is around the mixers, which tests/layers compares with their equations."""
    model, input_ids = random_model(arch).double(), tokens_of(2, 9)
    x = model.token_embed(input_ids)
    if model.position_embed is not None:
        x = x + model.position_embed.weight[:9]
    if model.embed_norm is not None:
        x = model.embed_norm(x)
    for block in model.blocks:
        x = x + block.mixer(block.norm(x))
    expected = F.linear(model.norm(x), model.lm_head.weight)
    torch.testing.assert_close(model(input_ids), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('name, count', [
    ('mamba-130m', 129_135_360), ('mamba-370m', 371_516_416), ('mamba-790m', 793_204_224),
    ('mamba-1.4b', 1_372_178_432), ('mamba-2.8b', 2_768_345_600),
    ('mamba2-130m', 128_989_632), ('mamba2-370m', 368_346_624), ('mamba2-780m', 780_161_280),
    ('mamba2-1.3b', 1_343_757_312), ('mamba2-2.7b', 2_702_599_680),
    ('mamba2attn-2.7b', 2_702_599_680 + 6 * (
        2560 * 3 * 3840 + 5 * 3 * 3840 + 3840 * 2560  # a layer of attention
        - (2560 * 10576 + 5 * 5376 + 3 * 80 + 5120 + 5120 * 2560)))])
def test_published_sizes(name, count):
    with torch.device('meta'):
        model = CausalLM(name)
    assert sum(p.numel() for p in model.parameters()) == count
    rows = 50288 if '2' in name.partition('-')[0] else 50280
    assert model(torch.zeros(1, 2, dtype=torch.long, device='meta')).shape == (1, 2, rows)
    assert infer_arch(model.state_dict()) == name


def test_names_and_shapes_of_the_published_weights():
    with torch.device('meta'):
        model = CausalLM('mamba2-370m')
    of_layer = {
        'norm.weight': (1024,), 'mixer.dt_bias': (32,), 'mixer.A_log': (32,), 'mixer.D': (32,),
        'mixer.in_proj.weight': (4384, 1024), 'mixer.conv1d.weight': (2304, 1, 4),
        'mixer.conv1d.bias': (2304,), 'mixer.norm.weight': (2048,),
        'mixer.out_proj.weight': (1024, 2048)}
    assert {k: tuple(v.shape) for k, v in to_official(model.state_dict()).items()} == {
        'backbone.embedding.weight': (50288, 1024), 'backbone.norm_f.weight': (1024,),
        'lm_head.weight': (50288, 1024),
        **{f'backbone.layers.{i}.{k}': v for i in range(48) for k, v in of_layer.items()}}


@pytest.mark.parametrize('arch', [
    dict(TINY, bias=True), dict(MAMBA2, bias=True), dict(ATTENTION, embed_dims=64)],
    ids=['mamba', 'mamba2', 'attention'])
def test_initial_weights_are_as_published(arch):
    """What feeds the residual stream starts smaller by the root of the number of blocks."""
    torch.manual_seed(0)
    model = CausalLM(arch, embed_dims=64, depth=9)
    assert 0.018 < model.token_embed.weight.std() < 0.022
    if model.position_embed is not None:
        assert 0.018 < model.position_embed.weight.std() < 0.022
    for block in model.blocks:
        largest = block.mixer.out_proj.weight.abs().max()
        bound = block.mixer.out_proj.in_features ** -0.5 / 3
        assert 0.95 * bound < largest <= bound
        assert block.mixer.in_proj.bias.count_nonzero() == 0
        assert block.mixer.out_proj.bias is None or block.mixer.out_proj.bias.count_nonzero() == 0
        if arch['mixer'] == 'mamba':
            dt = F.softplus(block.mixer.dt_proj.bias)
            assert dt.min() > 0.9e-3 and dt.max() < 0.11


@each_arch
def test_training_reaches_every_parameter_and_with_cp_changes_nothing(arch):
    input_ids = tokens_of(2, 13)
    grads = []
    for with_cp in (False, True):
        model = random_model(arch, with_cp=with_cp).train()
        torch.manual_seed(1)  # of the dropout
        loss = F.cross_entropy(model(input_ids[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(g.count_nonzero() for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0)


@each_with_stream
@pytest.mark.parametrize('autocast', [False, True], ids=['bf16', 'autocast'])
def test_half_precision_keeps_the_residual_stream_in_fp32(arch, autocast):
    model, input_ids = random_model(arch).bfloat16().float(), tokens_of(2, 17)
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


@each_arch
def test_gradients_go_through_the_state(arch):
    """Truncated backpropagation is the user's choice, who may detach the state."""
    model, input_ids = random_model(arch), tokens_of(1, 10)
    model(input_ids)[:, 6:].square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _, state = model(input_ids[:, :6], model.init_state(1))
    model(input_ids[:, 6:], state)[0].square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected,
                               atol=2e-5, rtol=2e-4)


@each_arch
def test_hooks_see_every_module_in_decoding(arch):
    """So that adapters and quantised layers work there as well."""
    model, seen = random_model(arch), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(tokens_of(1, 1), model.init_state(1))
    used = {name for name, _ in model.named_modules()
            if 'drop_path' not in name and name != 'blocks' and 'experts' not in name}
    assert seen >= used


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
    (dict(mixer='mamba9'),
     "arch.'mixer'.='mamba9' is not allowed; it must be 'mamba', 'mamba2', 'attention', 'rwkv4', "
     "'rwkv5', 'rwkv6', 'rwkv7', 'retnet' or 'jamba'"),
    (dict(vocab_size=0), 'vocab_size.*an int of at least 1'),
    (dict(depth=True), 'depth.*an int of at least 1'),
    (dict(d_conv=1), 'd_conv.*an int of at least 2'),
    (dict(expand=0), 'expand.*a number above 0'),
    (dict(expand=0.01), 'expand.*no channel.*at least 1/16'),
    (dict(dt_rank='full'), "dt_rank.*'auto' or an int"),
    (dict(tie_embeddings=1), 'tie_embeddings.*True or False'),
    (dict(norm_eps=0), 'norm_eps.*above 0'),
    (dict(norm='batch'), "norm.*'rms' or 'layer'"),
    (dict(drop_rate=1), 'drop_rate.*below 1'),
    (dict(max_positions=-1), 'max_positions.*at least 0'),
    (dict(head_dim=4), "'head_dim'. is an option of the mixer 'mamba2' and .*mixer 'mamba' has"),
    (dict(num_heads=4), "'num_heads'. is an option of the mixer 'attention' and attn_layers"),
    (dict(attn_layers=(1, 3)), r'attn_layers.*\(1, 3\) must be different numbers below the depth'),
    (dict(attn_layers=(1, 1)), 'attn_layers.*must be different numbers'),
    (dict(attn_layers=1), 'attn_layers.*numbers of layers, from 0'),
    (dict(attn_layers=(1,), num_heads=3), 'num_heads=3 must divide the 16 channels'),
    (dict(attn_layers=(1,), num_heads=2, num_kv_heads=4), 'num_kv_heads=4 must divide'),
    (dict(attn_layers=(1,), rotary_dims=18), 'rotary_dims must be even and at most head_dim=16'),
    (dict(attn_layers=(1,), attn_conv=1), 'attn_conv.*0 or an int of at least 2'),
    (dict(positions=True), r"unknown keys \['positions'\]")])
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(TINY, **changes)
    with pytest.raises(ValueError, match=message):
        CausalLM(**{**TINY, **changes})


@pytest.mark.parametrize('changes, message', [
    (dict(dt_rank=2), "'dt_rank'. is an option of the mixer 'mamba' and 'jamba'; the mixer 'mamba"),
    (dict(head_dim=5), 'head_dim=5 must divide the 32 channels'),
    (dict(n_groups=3), 'n_groups=3 must divide the 4 heads'),
    (dict(dt_limit=(1, 0)), 'dt_limit.*the smaller first'),
    (dict(ATTENTION, attn_layers=(0,)), "with mixer='attention' all have")])
def test_wrong_settings_of_other_mixers(changes, message):
    arch = changes if 'mixer' in changes else dict(MAMBA2, **changes)
    with pytest.raises(ValueError, match=message):
        CausalLM(arch)


def test_a_text_longer_than_the_positions():
    model = random_model(dict(ATTENTION, max_positions=8))
    with pytest.raises(ValueError, match='a text of 9 tokens is longer than max_positions=8'):
        model(tokens_of(2, 9))
    _, state = model(tokens_of(2, 5), model.init_state(2))
    with pytest.raises(ValueError, match='a text of 9 tokens is longer than max_positions=8'):
        model(tokens_of(2, 4), state)


def test_dropout_is_of_the_training_alone():
    model, input_ids = random_model(ATTENTION), tokens_of(2, 9)
    assert torch.equal(model(input_ids), model(input_ids))
    for name in ('drop_rate', 'attn_drop_rate'):
        model = random_model(dict(ATTENTION, drop_rate=0.0, attn_drop_rate=0.0) | {name: 0.5})
        expected = model(input_ids)
        found = model.train()(input_ids)
        assert (found - expected).abs().max() > 0.1


def test_a_name_that_does_not_exist():
    with pytest.raises(ValueError, match="arch='mamba-3b' does not exist; choose one of .*130m"):
        CausalLM('mamba-3b')
    with pytest.raises(ValueError, match='lacks .*embed_dims'):
        CausalLM(mixer='mamba')


# -- compiling -----------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', [TINY, MAMBA2, HYBRID, *RWKVS.values()],
                         ids=['mamba', 'mamba2', 'hybrid', *RWKVS])
def test_export(arch):
    model, ids = random_model(arch), tokens_of(2, 9)
    length = torch.export.Dim('length', min=2, max=1000)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: length},)).module()
    for length in (9, 30):
        ids = tokens_of(2, length)
        torch.testing.assert_close(program(ids), model(ids))


@pytest.mark.parametrize('arch', [TINY, MAMBA2, ATTENTION, *RWKVS.values()],
                         ids=['mamba', 'mamba2', 'attention', *RWKVS])
def test_one_graph_for_a_text_and_for_a_step(arch):
    torch._dynamo.reset()
    model = random_model(arch)
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
