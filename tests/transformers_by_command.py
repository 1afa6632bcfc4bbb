"""What tests run in a Python that has transformers: ``FOLDER STEP``.

transformers keeps mmpretrain from being imported, so that it may be in an environment of its own,
which ``make setup-transformers`` makes. The step ``jamba`` writes models as it saves them, with
their results; the step ``dropin`` compares its models with themselves on the ops of this package.
"""

import json
import logging
import os
import sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'


def main(folder, step):
    import torch
    torch.set_num_threads(1)
    logging.getLogger('transformers').setLevel(logging.ERROR)
    print(json.dumps(STEPS[step](folder)))


# -- Jamba ---------------------------------------------------------------------------------------

#: Beside what all have: attention and experts at other places, one expert alone, other sizes.
JAMBAS = {
    'usual': dict(num_hidden_layers=6, attn_layer_period=4, attn_layer_offset=2),
    'published_pattern': dict(num_hidden_layers=8, attn_layer_period=8, attn_layer_offset=4,
                              num_key_value_heads=4, mamba_dt_rank='auto'),
    'other': dict(num_hidden_layers=3, attn_layer_period=2, attn_layer_offset=1,
                  expert_layer_period=3, expert_layer_offset=0, num_experts=5,
                  num_experts_per_tok=3, mamba_d_conv=3, mamba_expand=3, mamba_proj_bias=True,
                  mamba_conv_bias=False, num_attention_heads=2, num_key_value_heads=1,
                  tie_word_embeddings=True, rms_norm_eps=1e-4),
    'no_experts': dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=0,
                       num_experts=1)}


def jamba_model(name):
    import torch
    from transformers import JambaConfig, JambaForCausalLM
    torch.manual_seed(len(name))
    options = dict(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, mamba_d_state=4, mamba_dt_rank=2,
        attn_implementation='eager') | JAMBAS[name]
    model = JambaForCausalLM(JambaConfig(**options)).eval()
    shake(model)
    return model


def shake(model):
    """Values far enough apart that no logits look alike."""
    import torch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def write_jambas(folder):
    """Models in several files, in fp32 and bf16, and logits, texts and losses of each."""
    import torch
    from safetensors.torch import save_file
    from transformers import JambaForCausalLM
    for name in JAMBAS:
        model = jamba_model(name)
        tokens = torch.randint(37, (2, 11))
        for dtype in (torch.float32, torch.bfloat16):
            place = folder / f'{name}-{str(dtype).removeprefix("torch.")}'
            model.to(dtype).save_pretrained(place, max_shard_size='20KB')
            read = JambaForCausalLM.from_pretrained(place, dtype=torch.float32,
                                                    attn_implementation='eager').eval()
            with torch.no_grad():
                has_experts = name != 'no_experts'
                result = read(tokens, output_router_logits=has_experts)
                text = read.generate(tokens[:1], max_new_tokens=9, do_sample=False, eos_token_id=-1,
                                     pad_token_id=0, attention_mask=torch.ones_like(tokens[:1]))
            loss = result.aux_loss if has_experts else torch.zeros(())
            save_file(dict(tokens=tokens, logits=result.logits.contiguous(), text=text, loss=loss),
                      place / 'expected.st')
    return sorted(p.name for p in folder.iterdir())


# -- its models on our ops -------------------------------------------------------------------------

def dropin_models():
    """Small models of all kinds that ``install_transformers`` covers."""
    import transformers
    scans = dict(vocab_size=37, hidden_size=16, num_hidden_layers=2, state_size=4)
    return {
        'mamba': ('Mamba', dict(scans)),
        'mamba_gelu': ('Mamba', dict(scans, hidden_act='gelu', use_bias=True, conv_kernel=3)),
        'falcon_mamba': ('FalconMamba', dict(scans)),
        'mamba2': ('Mamba2', dict(scans, num_heads=4, head_dim=8, n_groups=2, chunk_size=4,
                                  time_step_limit=(0.01, 1.0))),
        'jamba': ('Jamba', dict(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, num_experts=4, attn_layer_period=2,
            attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=2))}, transformers


def results_of(model, tokens, mask):
    """Logits, also of padded rows, a text, and in training the loss and all gradients."""
    import torch
    model.eval()
    with torch.no_grad():
        results = dict(logits=model(tokens).logits, padded=model(
            tokens, attention_mask=mask).logits[mask.bool()])
        results['text'] = model.generate(
            tokens[:, :7], max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0,
            attention_mask=torch.ones_like(tokens[:, :7])).float()
    model.train()
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return results | dict(loss=loss.detach()) | {
        f'grad {name}': p.grad.clone() for name, p in model.named_parameters()
        if p.grad is not None}


def count_calls(models, kind):
    """{function: how often a model calls ours}, from now on."""
    import functools
    calls = {}

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)
        return call

    place = {'FalconMamba': 'falcon_mamba'}.get(kind, kind.lower())
    models[place] = {name: counted(name, function) for name, function in models[place].items()}
    return calls


def compare_dropin(folder):
    """By model: the largest error of each kind of result, relative, and whether ours ran."""
    import torch

    from vmamba_mm.dropin import install_transformers, uninstall_transformers
    from vmamba_mm.integrations.dropin import hugging_face
    kinds, transformers = dropin_models()
    found = {}
    for name, (kind, options) in kinds.items():
        torch.manual_seed(1)
        config = getattr(transformers, f'{kind}Config')(**options)
        model = getattr(transformers, f'{kind}ForCausalLM')(config)
        shake(model)
        tokens = torch.randint(37, (2, 11))
        mask = torch.ones_like(tokens)
        mask[0, :4] = 0
        expected = results_of(model, tokens, mask)
        calls = count_calls(hugging_face.MODELS, kind)
        covered = install_transformers()
        results = results_of(model, tokens, mask)
        uninstall_transformers()
        again = results_of(model, tokens, mask)
        errors = {'text': 0.0, 'logits': 0.0, 'padded': 0.0, 'loss': 0.0, 'grad': 0.0}
        for key, value in expected.items():
            place = key.partition(' ')[0]
            scale = value.norm().clamp_min(1e-6)
            errors[place] = max(errors[place], ((results[key] - value).norm() / scale).item())
            assert torch.equal(again[key], value), f'{name}: {key} after uninstall_transformers'
        assert set(results) == set(expected), name
        found[name] = dict(errors, calls=calls, covered=covered)
    return found


STEPS = {'jamba': write_jambas, 'dropin': compare_dropin}

if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2])
