"""TimeMamba, the temporal adapter of Video Mamba Suite (arXiv 2403.09626, section 4.4)."""

from collections.abc import Mapping
from typing import Any

from vmamba_mm.families.base import Family, Rule, infer_image_size, is_int, is_number, one_of
from vmamba_mm.families.video_mamba_suite import LICENCE, SYSTEM, URL
from vmamba_mm.families.vivim import RULES as VIVIM_RULES
from vmamba_mm.families.vivim import check_grid, count_blocks

_BASE = dict(embed_dims=768, depth=12, num_heads=12, mlp_ratio=4.0, d_state=16, expand=1.0,
             patch_size=16, image_size=224)
#: The first is that of all fine-tuned files.
ARCHS = {'base_vanilla': dict(_BASE, style='timesformer-div'),
         'base_frozen': dict(_BASE, style='frozen-in-time')}

_INT = Rule(lambda v: is_int(v, 1), 'an int of at least 1')
RULES = {
    'embed_dims': _INT, 'depth': _INT, 'num_heads': _INT,
    'mlp_ratio': Rule(lambda v: is_number(v) and v > 0, 'a number above 0'),
    **{key: VIVIM_RULES[key] for key in ('d_state', 'expand', 'patch_size', 'image_size')},
    'style': one_of('frozen-in-time', 'timesformer-div', 'frozen-joint'),
}


def _check(arch: Mapping[str, Any]) -> None:
    check_grid(arch)
    if arch['embed_dims'] % arch['num_heads']:
        raise ValueError(f"arch['num_heads']={arch['num_heads']!r} must divide embed_dims="
                         f"{arch['embed_dims']!r}")


def _infer_arch(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The style leaves no trace, nor do the heads: each has 64 channels, as in CLIP, or few more
    where these do not divide all."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    block = 'blocks.0.'
    dims, _, patch_size, _ = shapes['patch_embed.proj.weight']
    _, tokens, _ = shapes['pos_embed']
    inner, d_state = shapes[f'{block}time_mamba.A_log']
    hidden, _ = shapes[f'{block}mlp.fc1.weight']
    num_heads = next(n for n in range(max(1, dims // 64), 0, -1) if dims % n == 0)
    return dict(
        embed_dims=dims, depth=count_blocks(shapes), num_heads=num_heads, mlp_ratio=hidden / dims,
        d_state=d_state, expand=inner / dims, patch_size=patch_size,
        image_size=infer_image_size(tokens - 1, patch_size), style='timesformer-div')


#: (name in CLIP's image encoder, as OpenAI and open_clip have it, ours).
CLIP_KEYS = (
    ('class_embedding', 'cls_token'), ('positional_embedding', 'pos_embed'),
    ('conv1', 'patch_embed.proj'), ('ln_pre', 'ln_pre'), ('ln_post', 'norm'),
    ('transformer.resblocks.#.ln_1', 'blocks.#.norm1'),
    ('transformer.resblocks.#.ln_2', 'blocks.#.norm2'),
    ('transformer.resblocks.#.attn.in_proj_weight', 'blocks.#.attn.qkv.weight'),
    ('transformer.resblocks.#.attn.in_proj_bias', 'blocks.#.attn.qkv.bias'),
    ('transformer.resblocks.#.attn.out_proj', 'blocks.#.attn.proj'),
    ('transformer.resblocks.#.mlp.c_fc', 'blocks.#.mlp.fc1'),
    ('transformer.resblocks.#.mlp.c_proj', 'blocks.#.mlp.fc2'),
    ('proj', None),
)

FAMILY = Family(
    name='timemamba', model='TimeMamba', system=SYSTEM, archs=ARCHS, rules=RULES, check=_check,
    keys=(('patch_embed.proj', 'patch_embed.proj'), ('pos_embed', 'pos_embed'),
          ('cls_token', 'cls_token'), ('ln_pre', 'ln_pre'),
          ('blocks.#.attn.Wqkv', 'blocks.#.attn.qkv'),
          ('blocks.#.attn.out_proj', 'blocks.#.attn.proj'),
          *((f'blocks.#.{name}', f'blocks.#.{name}') for name in (
              'norm1', 'norm2', 'norm3', 'mlp', 'time_mamba', 'alpha_timeattn')),
          ('norm', 'norm')),
    head_keys=(('fc_cls', 'head.fc'), ('image_projection', 'head.proj')), place='visual.',
    signature=('blocks.0.time_mamba.A_log', 'blocks.0.time_mamba.in_proj.weight',
               'blocks.0.time_mamba.A_b_log', 'blocks.0.alpha_timeattn',
               'blocks.0.attn.qkv.weight', 'blocks.0.norm3.weight', 'blocks.0.mlp.fc1.weight',
               'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'ln_pre.weight', 'norm.weight'),
    scalars=r'\.alpha_timeattn$', first_convs=('patch_embed.proj.weight',), infer_arch=_infer_arch,
    licence=LICENCE, url=URL)
