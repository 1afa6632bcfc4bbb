"""CausalLM with the mixers of RWKV: numbers, official files, published sizes and initial values."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from language_models import RWKVS, each_rwkv, random_model, tokens_of

from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.mamba_lm import FAMILY, arch_of_config
from vmamba_mm.models import CausalLM

# -- numbers, written out from the papers, a token at a time, with the official names -------------

def lerp(share, x, before):
    return share.flatten() * x + (1 - share.flatten()) * before


def time_mix4(w, x, before, state, first):
    num, den = state.setdefault('sums', [0, 0])
    k, v, r = (w[f'{name}.weight'] @ lerp(w[f'time_mix_{name[0]}'], x, before)
               for name in ('key', 'value', 'receptance'))
    bonus, decay = (w['time_first'] + k).exp(), (-w['time_decay'].exp()).exp()
    y = (num + bonus * v) / (den + bonus)
    state['sums'] = [decay * num + k.exp() * v, decay * den + k.exp()]
    return w['output.weight'] @ (r.sigmoid() * y)


def matrix_state(w, state, r, k, v, decay, bonus, divisor, eps):
    """What RWKV 5 and 6 do with the state, head by head, and the norm of the results."""
    ys = []
    for h, (r_h, k_h, v_h, d_h, u_h) in enumerate(zip(r, k, v, decay, bonus, strict=True)):
        S = state.get(h, torch.zeros(len(k_h), len(v_h)).double())
        new = torch.outer(k_h, v_h)
        y = r_h @ (S + torch.diag(u_h) @ new) / divisor
        state[h] = torch.diag(d_h) @ S + new
        ys.append((y - y.mean()) / (y.var(unbiased=False) + eps).sqrt())
    return torch.cat(ys) * w['ln_x.weight'] + w['ln_x.bias']


def time_mix5(w, x, before, state, first):
    shape = w['time_faaaa'].shape
    r, k, v = ((w[f'{name}.weight'] @ lerp(w[f'time_mix_{name[0]}'], x, before)).view(shape)
               for name in ('receptance', 'key', 'value'))
    y = matrix_state(w, state, r, k, v, (-w['time_decay'].exp()).exp(), w['time_faaaa'], 2, 1e-5)
    gate = w['gate.weight'] @ lerp(w['time_mix_g'], x, before)
    return w['output.weight'] @ (y * F.silu(gate))


def time_mix6(w, x, before, state, first):
    change, shape = before - x, w['time_faaaa'].shape
    hidden = ((x + change * w['time_maa_x'].flatten()) @ w['time_maa_w1']).tanh().view(5, -1)
    xw, xk, xv, xr, xg = (
        x + change * (w[f'time_maa_{name}'].flatten() + hidden[i] @ w['time_maa_w2'][i])
        for i, name in enumerate('wkvrg'))
    raw = w['time_decay'].flatten() + (xw @ w['time_decay_w1']).tanh() @ w['time_decay_w2']
    r, k, v = ((w[f'{name}.weight'] @ t).view(shape)
               for name, t in (('receptance', xr), ('key', xk), ('value', xv)))
    y = matrix_state(w, state, r, k, v, (-raw.exp()).exp().view(shape), w['time_faaaa'], 1, 4e-5)
    return w['output.weight'] @ (y * F.silu(w['gate.weight'] @ xg))


def time_mix7(w, x, before, state, first):
    xs = {name: x + (before - x) * w[f'x_{name}'].flatten() for name in 'rwkvag'}
    r, k, v = (w[f'{name}.weight'] @ xs[name[0]] for name in ('receptance', 'key', 'value'))
    if not first:
        first.append(v)
    else:
        share = (w['v0'].flatten() + xs['v'] @ w['v1'] @ w['v2']).sigmoid()
        v = v + (first[0] - v) * share
    decay = w['w0'].flatten() + (xs['w'] @ w['w1']).tanh() @ w['w2']
    decay = (-torch.tensor(-0.5).double().exp() * decay.sigmoid()).exp()
    rate = (w['a0'].flatten() + xs['a'] @ w['a1'] @ w['a2']).sigmoid()
    gate = (xs['g'] @ w['g1']).sigmoid() @ w['g2']
    shape = w['r_k'].shape
    removed = (k * w['k_k'].flatten()).view(shape)
    k = k * (1 + (rate - 1) * w['k_a'].flatten())
    ys = []
    for h, (r_h, k_h, v_h, d_h, kappa, a_h, bonus) in enumerate(zip(
            *(t.view(shape) for t in (r, k, v, decay, removed, rate, w['r_k'])), strict=True)):
        kappa = kappa / kappa.norm()
        S = state.get(h, torch.zeros(len(v_h), len(k_h)).double())  # values by keys, as the paper
        S = S @ (torch.diag(d_h) - torch.outer(kappa, a_h * kappa)) + torch.outer(v_h, k_h)
        state[h], y = S, S @ r_h
        y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt()
        part = slice(h * len(v_h), (h + 1) * len(v_h))
        y = y * w['ln_x.weight'][part] + w['ln_x.bias'][part]
        ys.append(y + (r_h * k_h * bonus).sum() * v_h)
    return w['output.weight'] @ (torch.cat(ys) * gate)


def channel_mix(w, x, before):
    if 'x_k' in w:
        return w['value.weight'] @ (
            w['key.weight'] @ (x + (before - x) * w['x_k'].flatten())).relu() ** 2
    shares = [w[f'time_mix_{n}'] if 'time_mix_k' in w else 1 - w[f'time_maa_{n}'] for n in 'kr']
    k, r = (w[f'{name}.weight'] @ lerp(share, x, before)
            for name, share in zip(('key', 'receptance'), shares, strict=True))
    return r.sigmoid() * (w['value.weight'] @ k.relu() ** 2)


def by_hand(weights, depth, dims, input_ids, time_mix):
    """Logits (L, V) of the text, in fp64, from official weights."""
    w = {k: v.double() for k, v in weights.items()}

    def inside(place):
        return {k.removeprefix(place): v for k, v in w.items() if k.startswith(place)}

    def norm(x, place):
        return F.layer_norm(x, x.shape, w[f'{place}.weight'], w[f'{place}.bias'])

    logits, states = [], [({}, {'ln1': 0, 'ln2': 0}) for _ in range(depth)]
    zero = torch.zeros(dims).double()
    for token in input_ids:
        x, first = norm(w['emb.weight'][token], 'blocks.0.ln0'), []
        for i, (state, last) in enumerate(states):
            for name, ln in (('att', 'ln1'), ('ffn', 'ln2')):
                before, normed = zero + last[ln], norm(x, f'blocks.{i}.{ln}')
                part = inside(f'blocks.{i}.{name}.')
                x = x + (time_mix(part, normed, before, state, first) if name == 'att'
                         else channel_mix(part, normed, before))
                last[ln] = normed
        logits.append(w['head.weight'] @ norm(x, 'ln_out'))
    return torch.stack(logits)


TIME_MIXES = dict(rwkv4=time_mix4, rwkv5=time_mix5, rwkv6=time_mix6, rwkv7=time_mix7)


@each_rwkv
@torch.no_grad()
def test_logits_are_those_of_the_paper(arch):
    model, input_ids = random_model(arch), tokens_of(2, 21)
    weights = to_official(model.state_dict())
    expected = torch.stack([by_hand(weights, 3, 16, row, TIME_MIXES[arch['mixer']])
                            for row in input_ids])
    torch.testing.assert_close(model(input_ids).double(), expected, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(model.double()(input_ids), expected, atol=1e-9, rtol=1e-9)


# -- official files --------------------------------------------------------------------------------

OF_BLOCK = 'ln1.weight ln1.bias ln2.weight ln2.bias att.output.weight att.key.weight ' \
    'att.value.weight att.receptance.weight ffn.key.weight ffn.value.weight'
OF_HEADS = 'att.ln_x.weight att.ln_x.bias'
NAMES = dict(
    rwkv4='att.time_decay att.time_first att.time_mix_k att.time_mix_v att.time_mix_r '
          'ffn.time_mix_k ffn.time_mix_r ffn.receptance.weight',
    rwkv5='att.time_decay att.time_faaaa att.time_mix_k att.time_mix_v att.time_mix_r '
          'att.time_mix_g att.gate.weight ffn.time_mix_k ffn.time_mix_r ffn.receptance.weight '
          + OF_HEADS,
    rwkv6='att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r '
          'att.time_maa_g att.time_maa_w1 att.time_maa_w2 att.time_decay att.time_decay_w1 '
          'att.time_decay_w2 att.time_faaaa att.gate.weight ffn.time_maa_k ffn.time_maa_r '
          'ffn.receptance.weight ' + OF_HEADS,
    rwkv7='att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w0 att.w1 att.w2 att.a0 att.a1 '
          'att.a2 att.v0 att.v1 att.v2 att.g1 att.g2 att.k_k att.k_a att.r_k ffn.x_k ' + OF_HEADS)


def official_names(mixer, depth):
    of_block = f'{OF_BLOCK} {NAMES[mixer]}'.split()
    unused = {f'blocks.0.att.v{i}' for i in range(3)} if mixer == 'rwkv7' else set()
    return {f'blocks.{i}.{name}' for i in range(depth) for name in of_block} - unused | {
        'emb.weight', 'blocks.0.ln0.weight', 'blocks.0.ln0.bias', 'ln_out.weight', 'ln_out.bias',
        'head.weight'}


@each_rwkv
def test_official_files(arch, tmp_path):
    """Bare state dicts in bf16, without a config.json."""
    model, input_ids = random_model(arch).bfloat16().float(), tokens_of(1, 9)
    official = to_official(model.state_dict())
    assert set(official) == official_names(arch['mixer'], 3)
    torch.save({k: v.bfloat16() for k, v in official.items()}, tmp_path / 'rwkv.pth')
    assert family_of(official) is family_of(model.state_dict()) is FAMILY
    # The divisor of heads leaves no trace.
    unseen = {k: v for k, v in arch.items() if k == 'head_divisor'}
    found = CausalLM.from_pretrained(tmp_path / 'rwkv.pth', **unseen)
    assert found.arch == arch == infer_arch(official) | unseen
    assert not found.training and found.lm_head.weight.dtype == torch.float32
    assert torch.equal(found(input_ids), model(input_ids))
    other = CausalLM(arch)
    other.load_pretrained(tmp_path / 'rwkv.pth')
    assert torch.equal(other.eval()(input_ids), model(input_ids))
    other = CausalLM(arch).eval()
    other.load_state_dict(official)
    assert torch.equal(other(input_ids), model(input_ids))
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    assert torch.equal(CausalLM.from_pretrained(tmp_path / 'ours.pth', **unseen)(input_ids),
                       model(input_ids))


def transformers_name(name):
    for official, theirs in (('emb.', 'rwkv.embeddings.'), ('blocks.0.ln0', 'rwkv.blocks.0.pre_ln'),
                             ('ln_out', 'rwkv.ln_out'), ('blocks.', 'rwkv.blocks.')):
        if name.startswith(official):
            name = theirs + name.removeprefix(official)
            break
    for short, long in (('.att.', '.attention.'), ('.ffn.', '.feed_forward.'),
                        ('time_mix_k', 'time_mix_key'), ('time_mix_v', 'time_mix_value'),
                        ('time_mix_r', 'time_mix_receptance')):
        name = name.replace(short, long)
    return name


def test_folders_of_transformers(tmp_path):
    model, input_ids = random_model(RWKVS['rwkv4']), tokens_of(1, 9)
    state = {transformers_name(k): v for k, v in to_official(model.state_dict()).items()}
    assert 'rwkv.blocks.1.attention.time_mix_receptance' in state
    assert family_of(state) is FAMILY and infer_arch(state) == RWKVS['rwkv4']
    torch.save(state, tmp_path / 'pytorch_model.bin')
    config = dict(architectures=['RwkvForCausalLM'], model_type='rwkv', hidden_size=16,
                  num_hidden_layers=3, vocab_size=29, attention_hidden_size=24,
                  intermediate_size=40, layer_norm_epsilon=1e-5, rescale_every=6,
                  tie_word_embeddings=False, context_length=1024, use_cache=True)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    found = CausalLM.from_pretrained(tmp_path)
    assert found.arch == RWKVS['rwkv4'] and torch.equal(found(input_ids), model(input_ids))
    published = dict(config, hidden_size=768, num_hidden_layers=12, vocab_size=50277,
                     attention_hidden_size=768, intermediate_size=3072)
    assert arch_of_config(published) == FAMILY.archs['rwkv4-169m']


def test_the_first_layer_of_rwkv7_may_have_weights_that_nothing_reads(tmp_path):
    model = random_model(RWKVS['rwkv7'])
    official = to_official(model.state_dict())
    more = official | {f'blocks.0.att.v{i}': official[f'blocks.1.att.v{i}'] for i in range(3)}
    torch.save(more, tmp_path / 'rwkv.pth')
    found = CausalLM.from_pretrained(tmp_path / 'rwkv.pth')
    assert torch.equal(found(tokens_of(1, 5)), model(tokens_of(1, 5)))


@each_rwkv
def test_what_does_not_fit_is_refused(arch, tmp_path):
    official = to_official(random_model(arch).state_dict())
    for name in ('blocks.1.att.output.weight', 'blocks.2.ffn.key.weight', 'blocks.1.ln2.bias',
                 'blocks.0.ln0.weight'):
        torch.save({k: v for k, v in official.items() if k != name}, tmp_path / 'a.pth')
        with pytest.raises(UserError, match='is missing|but lack') as info:
            CausalLM.from_pretrained(tmp_path / 'a.pth')
        assert '\n' not in str(info.value)
    assert family_of(official | {'more.weight': torch.ones(1)}) is None


def test_rwkv_between_versions_is_refused(tmp_path):
    """RWKV 5.0 and 5.1 have a decay for each head, and 5.0 no gate."""
    official = to_official(random_model(RWKVS['rwkv5']).state_dict())
    before = {k: v[:, 0] if k.endswith('time_decay') else v for k, v in official.items()}
    torch.save(before, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth|not its shapes'):
        CausalLM.from_pretrained(tmp_path / 'a.pth')


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(mixer='rwkv7', head_dim=5), 'head_dim.*=5 must divide the 16 channels'),
    (dict(mixer='rwkv6', att_dims=10, head_dim=4), 'head_dim.*=4 must divide the 10 channels'),
    (dict(mixer='rwkv7', head_dim=4, att_dims=24), "'att_dims'. is an option of the mixer 'rwkv4'"),
    (dict(mixer='rwkv4', head_dim=4), "'head_dim'. is an option.*'rwkv4' has"),
    (dict(mixer='rwkv4', ffn_dims=0), 'ffn_dims.*None or an int of at least 1'),
    (dict(mixer='rwkv4', embed_norm=False), "embed_norm.*of the mixer 'rwkv4' must be True"),
    (dict(mixer='rwkv5', head_divisor=0), 'head_divisor.*a number above 0'),
    (dict(mixer='rwkv6', head_dim=4, attn_layers=(1,)), "attn_layers.*'mamba2', not with 'rwkv6'")])
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(vocab_size=29, embed_dims=16, depth=2, **changes)


# -- published models ------------------------------------------------------------------------------

#: Exact counts, those of RWKV-7 without blocks.0.att.v0, v1 and v2.
SIZES = {'rwkv4-169m': 169_342_464, 'rwkv5-0.4b': 461_721_600, 'rwkv6-1.6b': 1_599_873_024,
         'rwkv7-0.1b': 191_034_624, 'rwkv7-1.5b': 1_527_404_544}


@pytest.mark.parametrize('name', [name for name in CausalLM.arch_settings if 'rwkv' in name])
def test_published_sizes(name):
    with torch.device('meta'):
        model = CausalLM(name)
    count = sum(p.numel() for p in model.parameters())
    if name in SIZES:
        assert count == SIZES[name]
    rows = 50277 if 'rwkv4' in name else 65536
    tokens = torch.zeros(1, 2, dtype=torch.long, device='meta')
    assert model(tokens).shape == (1, 2, rows)
    assert infer_arch(to_official(model.state_dict())) == name


def test_names_and_shapes_of_a_published_file():
    """Some of RWKV-6 with 12 layers of 768 channels, and how many there are."""
    with torch.device('meta'):
        model = CausalLM(mixer='rwkv6', vocab_size=65536, embed_dims=768, depth=12)
    official = {k: tuple(v.shape) for k, v in to_official(model.state_dict()).items()}
    assert sum(p.numel() for p in model.parameters()) == 196_955_136
    assert official['blocks.3.att.time_maa_w1'] == (768, 160)
    assert official['blocks.3.att.time_maa_w2'] == (5, 32, 768)
    assert official['blocks.3.att.time_decay'] == official['blocks.3.ffn.time_maa_k'] == (1, 1, 768)
    assert official['blocks.3.att.time_faaaa'] == (12, 64)
    assert official['blocks.3.ffn.key.weight'] == (2688, 768)


@each_rwkv
def test_initial_values_are_as_published(arch):
    torch.manual_seed(0)
    dims, depth = 32, 4
    model = CausalLM(dict(mixer=arch['mixer'], vocab_size=64, embed_dims=dims, depth=depth)
                     | ({} if arch['mixer'] == 'rwkv4' else dict(head_dim=8)))
    weights = to_official(model.state_dict())
    assert weights['emb.weight'].abs().max() <= 1e-4
    gram = weights['head.weight'].T @ weights['head.weight']
    torch.testing.assert_close(gram, 0.5 * torch.eye(dims), atol=1e-5, rtol=0)
    ramp = torch.arange(dims) / dims
    for i in range(depth):
        w = {k.removeprefix(f'blocks.{i}.'): v.flatten() for k, v in weights.items()
             if k.startswith(f'blocks.{i}.')}
        for zero in ('att.output.weight', 'ffn.value.weight', 'ffn.receptance.weight'):
            assert zero not in w or not w[zero].any()
        key = weights[f'blocks.{i}.att.key.weight']
        torch.testing.assert_close(key @ key.T, 0.01 * torch.eye(dims), atol=1e-6, rtol=0)
        first, last = i / 3, 1 - i / 4
        decay = torch.arange(dims) / (dims - 1)
        if arch['mixer'] == 'rwkv4':
            torch.testing.assert_close(w['att.time_decay'], -5 + 8 * decay ** (0.7 + 1.3 * first))
            torch.testing.assert_close(w['att.time_mix_v'], ramp ** last + 0.3 * first)
            torch.testing.assert_close(
                w['att.time_first'][:4], math.log(0.3) + torch.tensor([0, 0.5, -0.5, 0]))
            continue
        torch.testing.assert_close(w['att.ln_x.weight'],
                                   torch.full((dims,), ((i + 1) / depth) ** 0.7))
        if arch['mixer'] == 'rwkv7':
            torch.testing.assert_close(w['att.x_r'], 1 - ramp ** (0.2 * last))
            torch.testing.assert_close(w['ffn.x_k'], 1 - ramp ** last ** 4)
            assert not w['att.w1'].any() and not w['att.a1'].any() and w['att.w2'].any()
            continue
        torch.testing.assert_close(w['att.time_decay'], -6 + 5 * decay ** (0.7 + 1.3 * first))
        share = w['att.time_mix_r'] if arch['mixer'] == 'rwkv5' else 1 - w['att.time_maa_r']
        torch.testing.assert_close(share, ramp ** (0.5 * last))
        torch.testing.assert_close(w['att.time_faaaa'][:2],
                                   first * (1 - decay[:2]) + torch.tensor([0.0, 0.1]))
