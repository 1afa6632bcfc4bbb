"""Jamba: its numbers beside transformers', its files, which are read in bounded memory, and what is
special about its architectures. test_causal_lm.py and test_generation.py have the rest."""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from language_models import JAMBA, random_model, tokens_of
from safetensors.torch import load_file, save_file
from transformers_by_command import JAMBAS
from with_transformers import run_step

from vmamba_mm.checkpoints import lazy
from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families.jamba import layers_of
from vmamba_mm.layers import MixtureOfExperts, load_balance_loss
from vmamba_mm.models import CausalLM


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Models as transformers saves them, with its results."""
    folder = tmp_path_factory.mktemp('jamba')
    assert len(run_step(folder, 'jamba')) == 2 * len(JAMBAS)
    return folder


# -- numbers of transformers ---------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', JAMBAS)
def test_results_are_those_of_transformers(written, name, dtype):
    """The folder is in several files; the model is in fp32, whatever they are in."""
    folder = written / f'{name}-{dtype}'
    assert len(list(folder.glob('model-*.safetensors'))) > 1 or name == 'no_experts'
    model, expected = CausalLM.from_pretrained(folder), load_file(folder / 'expected.st')
    scores = []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.router.register_forward_hook(lambda *call: scores.append(call[-1]))
    torch.testing.assert_close(model(expected['tokens']), expected['logits'], atol=1e-5, rtol=1e-5)
    if scores:
        loss = load_balance_loss(scores, model.arch.get('experts_per_token', 2))
        torch.testing.assert_close(loss, expected['loss'], atol=1e-5, rtol=1e-5)
    text = model.generate(expected['tokens'][:1], 9)
    assert text.tolist() == expected['text'].tolist()


def test_arch_of_weights_alone(written):
    folder = written / 'usual-float32'
    weights = {}
    for file in folder.glob('model*.safetensors'):
        weights |= load_file(file)
    arch = CausalLM.from_pretrained(folder).arch
    found = infer_arch({k: v for k, v in weights.items()})
    # Nothing tells how wide a head is, and what is not published is taken to be one of keys.
    assert found == {**arch, 'num_heads': 2, 'num_kv_heads': 1, 'mixer': 'jamba'}
    save_file(weights, folder.parent / 'alone.safetensors')
    with pytest.raises(UserError, match='the weights do not tell how many heads'):
        CausalLM.from_pretrained(folder.parent / 'alone.safetensors')
    model = CausalLM.from_pretrained(folder.parent / 'alone.safetensors', num_heads=4,
                                     num_kv_heads=2)
    assert model.arch == arch


# -- files ---------------------------------------------------------------------------------------

def write(folder, model, parts=4):
    """A folder in several files, as published ones are."""
    state = {k: v.clone() for k, v in to_official(model.state_dict()).items()}
    names, file_of = list(state), {}
    for i in range(parts):
        file = f'model-{i + 1:05}-of-{parts:05}.safetensors'
        save_file({k: state[k] for k in names[i::parts]}, folder / file)
        file_of |= dict.fromkeys(names[i::parts], file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=file_of)))
    return state


KWARGS = dict(num_heads=4, num_kv_heads=2, experts_per_token=3)


def test_official_names():
    model = random_model(JAMBA)
    names = to_official(model.state_dict())
    assert 'model.layers.0.mamba.out_proj.weight' in names
    other = CausalLM(JAMBA)
    other.load_state_dict(names)
    assert torch.equal(other(tokens_of(1, 5)), model(tokens_of(1, 5)))
    assert {'model.embed_tokens.weight', 'model.final_layernorm.weight', 'lm_head.weight',
            'model.layers.0.mamba.dt_layernorm.weight', 'model.layers.0.pre_ff_layernorm.weight',
            'model.layers.1.self_attn.o_proj.weight', 'model.layers.1.feed_forward.router.weight',
            'model.layers.1.feed_forward.experts.3.up_proj.weight',
            'model.layers.0.feed_forward.gate_proj.weight'} <= set(names)


def test_memory_is_that_of_the_model_and_one_weight(tmp_path, monkeypatch):
    model = random_model(JAMBA)
    write(tmp_path, model)
    alive, most = weakref.WeakSet(), []

    class Spy:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            alive.add(tensor)
            most.append(len(alive))
            return tensor

    opened = lazy.open_safetensors

    class Open:
        def __init__(self, path):
            self.context = opened(path)

        def __enter__(self):
            f, meta = self.context.__enter__()
            return Spy(f), meta

        def __exit__(self, *args):
            return self.context.__exit__(*args)

    monkeypatch.setattr(lazy, 'open_safetensors', Open)
    found = CausalLM.from_pretrained(tmp_path, **KWARGS)
    # Embedding and head are read before, since the file alone does not say whether they are tied.
    assert len(most) == len(model.state_dict()) + 2
    assert max(most) <= 2  # the last, and the one before
    x = tokens_of(2, 9)
    assert torch.equal(found(x), model(x))


def test_dtypes(tmp_path):
    model = random_model(JAMBA).bfloat16()
    write(tmp_path, model)
    found = CausalLM.from_pretrained(tmp_path, dtype='auto', **KWARGS)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    x = tokens_of(2, 9)
    assert torch.equal(found(x), model(x))
    assert {p.dtype for p in CausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, **KWARGS).parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="dtype='half' does not exist"):
        CausalLM.from_pretrained(tmp_path, dtype='half')


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('model.layers.2.feed_forward.experts.1.up_proj.weight'),
     r'blocks.2.ffn.experts.1.gate.weight'),
    (lambda s: s.update({'model.layers.0.mamba.dt_layernorm.weight': torch.ones(3)}),
     'dt_norm.weight'),
    (lambda s: s.update({'model.layers.0.mamba.other.weight': torch.ones(3)}), 'mixer.other')])
def test_files_that_are_not_whole(tmp_path, change, message):
    """Refused by their headers, before anything is read."""
    state = write(tmp_path, random_model(JAMBA), parts=1)
    change(state)
    (tmp_path / 'model.safetensors.index.json').unlink()
    save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=message):
        CausalLM.from_pretrained(tmp_path, **KWARGS)


def test_parts_that_are_missing(tmp_path):
    write(tmp_path, random_model(JAMBA))
    index = tmp_path / 'model.safetensors.index.json'
    content = json.loads(index.read_text())
    content['weight_map']['model.more.weight'] = 'model-00001-of-00004.safetensors'
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match='is incomplete: model.more.weight is not in model-00001'):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / 'model-00002-of-00004.safetensors').unlink()
    with pytest.raises(UserError, match='its part model-00002-of-00004.safetensors is missing'):
        CausalLM.from_pretrained(tmp_path)


# -- architectures -------------------------------------------------------------------------------

@pytest.mark.parametrize('name, count, active', [
    ('jamba-v0.1', 51_570_323_328, 12_110_311_296),
    ('jamba-1.5-large', 398_555_145_696, 94_149_338_592)])
def test_published_sizes(name, count, active):
    with torch.device('meta'):
        model = CausalLM(name)
    assert sum(p.numel() for p in model.parameters()) == count
    unused = sum((len(m.experts) - m.top_k) * sum(p.numel() for p in m.experts[0].parameters())
                 for m in model.modules() if isinstance(m, MixtureOfExperts))
    assert count - unused == active
    assert infer_arch(model.state_dict()) == name


def test_layers():
    pattern = layers_of(dict(depth=10))
    assert [i for i, layer in enumerate(pattern) if layer.startswith('attention')] == [4]
    assert [i for i, layer in enumerate(pattern) if layer.endswith('+moe')] == [1, 3, 5, 7, 9]
    model = CausalLM(vocab_size=9, embed_dims=8, num_heads=2, layers=['mamba', 'attention+moe'])
    assert model.arch == dict(mixer='jamba', vocab_size=9, embed_dims=8, num_heads=2, depth=2,
                              layers=('mamba', 'attention+moe'))
    assert model.blocks[1].ffn.router.out_features == 16
    assert model.blocks[0].ffn.fc1.out_features == 28


@pytest.mark.parametrize('changes, message', [
    (dict(layers=['mamba', 'moe']), "layers.*for each layer one of .*'attention.moe'"),
    (dict(depth=5), 'says what 4 layers are, and .*depth.* is 5'),
    (dict(experts_per_token=5), 'experts_per_token.*=5 must be at most .*num_experts.*=4'),
    (dict(ffn_dims=0), 'ffn_dims.*at least 1'),
    (dict(norm='layer'), "norm.*must be 'rms'"),
    (dict(head_dim=4), "head_dim.*the mixer 'jamba' has"),
    (dict(num_heads=3), 'num_heads=3 must divide the 16 channels')])
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(dict(JAMBA, **changes))


# -- experts -------------------------------------------------------------------------------------

def test_mixture_by_hand():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(6, 10, num_experts=5, top_k=2).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weights = mixture.router(x).softmax(-1)
    rest = weights.topk(2).values[..., -1:]
    weights = weights * (weights >= rest)
    expected = sum(expert(x) * weights[..., i:i + 1] for i, expert in enumerate(mixture.experts))
    y = mixture(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    up = torch.randn_like(y)
    parameters = [x, *mixture.parameters()]
    for ours, theirs in zip(torch.autograd.grad(y, parameters, up, retain_graph=True),
                            torch.autograd.grad(expected, parameters, up), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert mixture(x[:0]).shape == (0, 7, 6)


def test_balanced_experts_have_the_least_loss():
    even = torch.eye(4).repeat(3, 1) * 20
    assert load_balance_loss([even, even], 1).item() == pytest.approx(1, abs=1e-4)
    assert load_balance_loss([F.one_hot(torch.zeros(9).long(), 4) * 20.0], 1) > 3.9
