"""What is special about language models of RetNet; the tests of CausalLM have the rest."""

import json

import pytest
import torch
import torch.nn.functional as F
from language_models import DEEPNORM, RETNET, random_model, tokens_of
from official import shared

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.checkpoints.names import infer_arch, to_official
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.families.mamba_lm import FAMILY
from vmamba_mm.models import CausalLM
from vmamba_mm.testing import assert_close

NAMES = (('token_embed', 'embed_tokens'), ('embed_norm', 'layernorm_embedding'),
         ('lm_head', 'output_projection'), ('blocks', 'layers'), ('norm', 'layer_norm'))


def fairseq_state(model):
    """As fairseq has it in its file, with the tables of positions and decays."""
    state = {}
    for name, value in model.state_dict().items():
        top, _, rest = name.partition('.')
        for ours, theirs in (('ffn_norm.', 'final_layer_norm.'), ('mixer.', 'retention.')):
            rest = rest.replace(ours, theirs)
        if top == 'blocks':
            rest = rest.replace('.norm.', '.retention_layer_norm.')
        state[f'decoder.{dict(NAMES)[top]}.{rest}'] = value.clone()
    return state | {'decoder.retnet_rel_pos.angle': torch.ones(8),
                    'decoder.retnet_rel_pos.decay': torch.ones(2)}


# --- around the mixers ----------------------------------------------------------------------------

def mlp(ffn, x, act):
    return ffn.fc2(act(ffn.fc1(x)) * ffn.gate(x))


def test_norms_before():
    model, input_ids = random_model(RETNET).double(), tokens_of(2, 9)
    x = model.token_embed(input_ids)
    for block in model.blocks:
        x = x + block.mixer(block.norm(x))
        x = x + mlp(block.ffn, block.ffn_norm(x), F.gelu)
    assert_close(model(input_ids), F.linear(model.norm(x), model.lm_head.weight), 1e-10)


def test_norms_after():
    """With DeepNorm, a scaled embedding that has a norm, and its weight in the head."""
    model, input_ids = random_model(DEEPNORM).double(), tokens_of(2, 9)
    alpha, x = 6 ** 0.25, model.embed_norm(4 * model.token_embed(input_ids))
    for block in model.blocks:
        x = block.norm(alpha * x + block.mixer(x))
        x = block.ffn_norm(alpha * x + mlp(block.ffn, x, F.silu))
    assert model.norm is None
    assert_close(model(input_ids), F.linear(x, model.token_embed.weight), 1e-10)


def test_without_mlp():
    model, input_ids = random_model(dict(RETNET, ffn_dims=0)).double(), tokens_of(2, 9)
    x = model.token_embed(input_ids)
    for block in model.blocks:
        x = x + block.mixer(block.norm(x))
    assert_close(model(input_ids), F.linear(model.norm(x), model.lm_head.weight), 1e-10)
    assert infer_arch(model.state_dict())['ffn_dims'] == 0


def test_state_does_not_grow():
    model = random_model(RETNET)
    with torch.no_grad():
        sizes = {tuple(part.shape for layer in model(tokens_of(1, length), model.init_state(1))[1]
                       for part in layer) for length in (1, 7, 40)}
    assert len(sizes) == 1


@pytest.mark.parametrize('dtype, scale', [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_half_precision(dtype, scale):
    for arch in (RETNET, DEEPNORM):
        model, input_ids = random_model(arch).to(dtype).float(), tokens_of(2, 17)
        with torch.no_grad():
            exact = model(input_ids)
            half = model.to(dtype)(input_ids)
        assert half.dtype == dtype
        assert (half - exact).square().mean().sqrt() < scale * exact.square().mean().sqrt()


def test_deepnorm_starts_smaller():
    found = []
    for deepnorm in (False, True):
        torch.manual_seed(0)
        found.append(CausalLM(RETNET, deepnorm=deepnorm).blocks[1])
    for name in ('mixer.v_proj', 'mixer.out_proj', 'ffn.fc1', 'ffn.fc2'):
        plain, small = (block.get_submodule(name).weight for block in found)
        torch.testing.assert_close(small, plain / 2)  # (8 * 2) ** (1 / 4)
    assert torch.equal(found[0].mixer.q_proj.weight, found[1].mixer.q_proj.weight)


# --- sizes and weights ----------------------------------------------------------------------------

@pytest.mark.parametrize('dims, values, heads, depth, count', [
    (512, 864, 2, 6, 19_077_632), (1024, 1728, 4, 16, 203_457_536),
    (2560, 4280, 10, 32, 2_523_302_400), (8192, 13824, 32, 64, 52_077_535_232)])
def test_sizes_of_the_official_code(dims, values, heads, depth, count):
    """Without embedding and head; their default for 5/3 of the channels is rounded otherwise."""
    with torch.device('meta'):
        model = CausalLM(mixer='retnet', vocab_size=10, embed_dims=dims, depth=depth,
                         value_dims=values, retention_heads=heads)
    assert sum(p.numel() for p in model.parameters()) == count + 20 * dims


def test_published_keys():
    published, = json.loads(shared('facts/keys/retnet.json').read_text()).values()
    with torch.device('meta'):
        model = CausalLM(mixer='retnet', vocab_size=50257, embed_dims=768, depth=12,
                         value_dims=1280, retention_heads=4)
    assert sum(p.numel() for p in model.parameters()) == published['params']
    found = {k: list(v.shape) for k, v in to_official(model.state_dict()).items()
             if not k.startswith('decoder.layers.') or k.startswith('decoder.layers.7.')}
    assert found == {k.replace('[0..11]', '7'): shape for k, shape in published['keys'].items()
                     if 'retnet_rel_pos' not in k}


@pytest.mark.parametrize('arch', [RETNET, DEEPNORM], ids=['retnet', 'deepnorm'])
def test_files_of_fairseq(arch, tmp_path):
    model, input_ids = random_model(arch), tokens_of(1, 7)
    state = fairseq_state(model)
    assert family_of(state) is FAMILY is family_of(model.state_dict())
    torch.save(dict(model=state, args=None, cfg=None, optimizer_history=[]), tmp_path / 'a.pt')
    back = to_official(read_checkpoint(tmp_path / 'a.pt')['state_dict'])
    assert back.keys() == {k for k in state if 'retnet_rel_pos' not in k}
    # What leaves no trace in weights has to be said.
    with pytest.raises(UserError, match='how many heads a RetNet has; give .*retention_heads'):
        CausalLM.from_pretrained(tmp_path / 'a.pt')
    untold = {k: arch[k] for k in ('retention_heads', 'retention_form', 'ffn_act', 'deepnorm',
                                   'scale_embedding') if k in arch}
    built = CausalLM.from_pretrained(tmp_path / 'a.pt', **untold)
    assert torch.equal(built(input_ids), model(input_ids)) and built.is_tied == model.is_tied
    with pytest.raises(UserError, match='does not fit|is missing'):
        CausalLM(dict(arch, ffn_dims=21)).load_pretrained(str(tmp_path / 'a.pt'))


def test_arch_of_weights():
    found = infer_arch(CausalLM(RETNET).state_dict())
    assert found == {k: v for k, v in RETNET.items() if k != 'retention_heads'}
    assert infer_arch(CausalLM(DEEPNORM).state_dict()).items() >= dict(
        post_norm=True, embed_norm=True, value_dims=24, ffn_dims=20, depth=3).items()


@pytest.mark.parametrize('changes, message', [
    (dict(retention_heads=3), 'retention_heads.*even number of the 16 channels of embed_dims'),
    (dict(value_dims=25), 'divide the 25 of value_dims'),
    (dict(retention_form='recurrent'), "retention_form.*must be 'chunkwise' or 'parallel'"),
    (dict(ffn_dims=0, deepnorm=True), 'ffn_dims.*no MLP, goes with neither'),
    (dict(ffn_act='relu'), "ffn_act.*must be 'gelu' or 'silu'"),
    (dict(norm='layer'), "norm.*'retnet' must be 'rms'"),
    (dict(attn_layers=(0,)), "attn_layers.*'mamba2', not with 'retnet'"),
    (dict(d_state=4), "'d_state'. is an option of the mixer 'mamba' and 'mamba2'; the mixer "
                      "'retnet' has")])
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(dict(RETNET, **changes))
