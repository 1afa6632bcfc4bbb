"""CausalLM: the files of others, names of weights, and config.json."""

import copy
import json
import math
import pickle

import pytest
import torch
from language_models import (
    HYBRID,
    MAMBA2,
    OTHER,
    OTHER2,
    TINY,
    each_arch,
    each_mamba,
    mamba_ssm_state,
    random_model,
    tokens_of,
    transformers_state,
)
from safetensors.torch import save_file

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.mamba_lm import FAMILY, arch_of_config
from vmamba_mm.models import CausalLM
from vmamba_mm.registry import MODELS

MAMBA_SSM = dict(d_model=16, n_layer=3, vocab_size=29, ssm_cfg=dict(d_state=4), rms_norm=True,
                 residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
TRANSFORMERS = dict(
    architectures=['MambaForCausalLM'], model_type='mamba', hidden_size=16, num_hidden_layers=3,
    vocab_size=29, state_size=4, conv_kernel=3, expand=1.5, time_step_rank=2, use_bias=True,
    use_conv_bias=False, layer_norm_epsilon=1e-5, tie_word_embeddings=False, hidden_act='silu')
#: Of Mamba-2, with every option that its arch can have.
MAMBA_SSM2 = dict(MAMBA_SSM, ssm_cfg=dict(
    layer='Mamba2', d_state=4, d_conv=3, expand=1.5, headdim=4, ngroups=2, d_ssm=16,
    norm_before_gate=True, D_has_hdim=True, dt_limit=[0.01, 0.5], conv_bias=False, bias=True,
    chunk_size=256), rms_norm=False, tie_embeddings=False, pad_vocab_size_multiple=1)
#: As mamba2attn-2.7b is described.
HYBRID_SSM = dict(MAMBA_SSM, ssm_cfg=dict(layer='Mamba2', d_state=4, headdim=8),
                  attn_layer_idx=[0, 2], d_intermediate=0, attn_cfg=dict(
    causal=True, d_conv=4, head_dim=6, num_heads=4, num_heads_kv=2, out_proj_bias=False,
    qkv_proj_bias=False, rotary_emb_dim=4))
TRANSFORMERS2 = dict(
    architectures=['Mamba2ForCausalLM'], model_type='mamba2', hidden_size=16, num_hidden_layers=3,
    vocab_size=32, state_size=4, conv_kernel=4, expand=2, head_dim=8, num_heads=4, n_groups=2,
    use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
    hidden_act='silu', rms_norm=True, norm_before_gate=True, time_step_rank=256, chunk_size=256,
    time_step_limit=[0.0, {'__float__': 'Infinity'}])
#: Archs, and the config.json that other libraries write for them.
FOLDERS = {
    'mamba': (TINY, MAMBA_SSM), 'mamba_hf': (OTHER, TRANSFORMERS),
    'mamba2': (OTHER2, MAMBA_SSM2), 'hybrid': (HYBRID, HYBRID_SSM),
    'mamba2_hf': (dict(MAMBA2, vocab_size=32, n_groups=2), TRANSFORMERS2)}


def write(folder, model, config):
    """A folder as the two libraries write it."""
    (folder / 'config.json').write_text(json.dumps(config))
    if 'd_model' in config:
        torch.save(mamba_ssm_state(model), folder / 'pytorch_model.bin')
        return folder / 'pytorch_model.bin'
    save_file(transformers_state(model), folder / 'model.safetensors', dict(format='pt'))
    return folder / 'model.safetensors'


@pytest.mark.parametrize('arch, config', FOLDERS.values(), ids=FOLDERS)
def test_folders_of_others(tmp_path, arch, config):
    model, input_ids = random_model(arch), tokens_of(1, 9)
    file = write(tmp_path, model, config)
    (tmp_path / 'alone').mkdir()
    alone = file.rename(tmp_path / 'alone/weights.bin')
    alone.with_name('copy').write_bytes(alone.read_bytes())
    file.write_bytes(alone.read_bytes())
    # Alone it does not tell how many rows of the embedding are tokens, nor how many groups, heads
    # or limits there are.
    unseen = {} if arch is OTHER else {
        'vocab_size': 29 if arch is OTHER2 else 32, 'n_groups': 1, 'norm_before_gate': False,
        'd_state': arch['d_state'] * arch.get('n_groups', 1), 'dt_limit': (0, math.inf)}
    hidden = {k: v for k, v in arch.items() if unseen.get(k, v) != v} | {
        k: arch[k] for k in ('num_heads', 'num_kv_heads', 'attn_head_dim', 'rotary_dims')
        if k in arch}
    for source in (tmp_path, file, alone):
        found = CausalLM.from_pretrained(source, **(hidden if source is alone else {}))
        assert not found.training and found.is_tied == arch.get('tie_embeddings', True)
        assert found.arch == arch
        assert (found(input_ids) == model(input_ids)).all()
    if arch is TINY:
        assert CausalLM.from_pretrained(alone).arch == dict(arch, vocab_size=32)
    other = CausalLM(arch)
    other.load_pretrained(file)
    assert (other(input_ids) == model(input_ids)).all()
    other = MODELS.build(dict(type='vmamba_mm.CausalLM', arch=arch,
                              init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path))))
    other.init_weights()
    assert (other(input_ids) == model(input_ids)).all()


@pytest.mark.parametrize('arch', [
    dict(mixer='attention', vocab_size=32, embed_dims=16, depth=2), HYBRID],
    ids=['attention', 'hybrid'])
def test_heads_are_not_guessed(tmp_path, arch):
    torch.save(mamba_ssm_state(random_model(arch)), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='a.pth: the weights do not tell how many heads'):
        CausalLM.from_pretrained(tmp_path / 'a.pth')


@each_mamba
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


@each_arch
def test_what_every_mixer_may_have(arch):
    model = random_model(dict(arch, max_positions=64, embed_norm=True))
    state = to_official(model.state_dict())
    assert family_of(state) is family_of(model.state_dict()) is FAMILY
    assert infer_arch(state).items() >= dict(max_positions=64).items()
    other = CausalLM(model.arch).eval()
    other.load_state_dict(state)
    assert torch.equal(other(tokens_of(1, 5)), model(tokens_of(1, 5)))


@pytest.mark.parametrize('arch', [TINY, MAMBA2], ids=['mamba', 'mamba2'])
def test_any_name_more_or_less_is_no_longer_recognised(arch):
    for names in (transformers_state, mamba_ssm_state, CausalLM.state_dict):
        model = random_model(arch)
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
    (dict(MAMBA_SSM, ssm_cfg=dict(layer='Mamba3')), "ssm_cfg.layer is 'Mamba3'"),
    (dict(MAMBA_SSM, ssm_cfg=dict(layer='Mamba2')), 'head_dim=64 must divide the 32 channels'),
    (dict(MAMBA_SSM, attn_layer_idx=[1]), 'attn_cfg.causal is False'),
    (dict(MAMBA_SSM, attn_layer_idx=[1], attn_cfg=dict(causal=True)), "lacks 'num_heads'"),
    (dict(HYBRID_SSM, attn_cfg=dict(HYBRID_SSM['attn_cfg'], mlp_dim=64)),
     'attn_cfg.mlp_dim is 64'),
    (dict(HYBRID_SSM, attn_layer_idx=[3]), 'attn_layers.*numbers below the depth'),
    (dict(MAMBA_SSM, d_intermediate=64), 'd_intermediate is 64'),
    (dict(TRANSFORMERS2, rms_norm=False), 'rms_norm is False'),
    (dict(TRANSFORMERS2, num_heads=5), 'num_heads is 5.*only 4'),
    (dict(TRANSFORMERS, hidden_act='gelu'), "hidden_act is 'gelu'"),
    # The same names of weights, and norms without weights inside the mixer.
    (dict(TRANSFORMERS, model_type='falcon_mamba'), r'another kind \(falcon_mamba\)'),
    (dict(vocab_size=3), 'another kind .no model_type'),
    (dict(d_model=16), "lacks 'n_layer'"),
    (dict(MAMBA_SSM, vocab_size='all'), 'vocab_size.*an int'),
    (['list'], 'cannot be used'), (None, 'cannot be used')])
def test_configs_of_other_models(tmp_path, config, message):
    write(tmp_path, random_model(), MAMBA_SSM)
    (tmp_path / 'config.json').write_text('{' if config is None else json.dumps(config))
    with pytest.raises(UserError, match=message) as info:
        CausalLM.from_pretrained(tmp_path)
    assert ('config.json' in str(info.value) or 'can be built' in str(info.value)) \
        and '\n' not in str(info.value)


def test_published_configs_give_published_architectures():
    ours = dict(d_model=768, n_layer=24, vocab_size=50277, ssm_cfg={}, rms_norm=True,
                residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
    # Those whose names end with -hf have keys of mamba_ssm besides.
    theirs = dict(model_type='mamba', d_model=768, n_layer=24, ssm_cfg={}, hidden_size=768,
                  pad_vocab_size_multiple=8, num_hidden_layers=24, vocab_size=50280,
                  state_size=16, conv_kernel=4, expand=2, time_step_rank=48, use_bias=False,
                  use_conv_bias=True, layer_norm_epsilon=1e-5, hidden_act='silu')
    assert arch_of_config(ours) == arch_of_config(theirs) == FAMILY.archs['mamba-130m']
    assert arch_of_config(dict(ours, ssm_cfg=dict(layer='Mamba2'), pad_vocab_size_multiple=16,
                               attn_layer_idx=[], attn_cfg={}, d_intermediate=0,
                               tie_embeddings=True)) == FAMILY.archs['mamba2-130m']
    assert arch_of_config(dict(
        model_type='mamba2', hidden_size=768, num_hidden_layers=24, vocab_size=50288, n_groups=1,
        num_heads=24, head_dim=64, state_size=128, conv_kernel=4, expand=2, use_bias=False,
        use_conv_bias=True, layer_norm_epsilon=1e-5, hidden_act='silu', rms_norm=True,
        tie_word_embeddings=True, time_step_limit=[0.0, math.inf],
        chunk_size=256)) == FAMILY.archs['mamba2-130m']
    assert arch_of_config(dict(
        ours, d_model=2560, n_layer=64, ssm_cfg=dict(layer='Mamba2'), pad_vocab_size_multiple=16,
        attn_layer_idx=[9, 18, 27, 36, 45, 56], attn_cfg=dict(
            causal=True, d_conv=4, head_dim=128, num_heads=30, out_proj_bias=False,
            qkv_proj_bias=False, rotary_emb_dim=64))) == FAMILY.archs['mamba2attn-2.7b']
