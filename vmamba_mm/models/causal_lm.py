"""A causal language model over the mixers of this package: Mamba's (arXiv 2312.00752), Mamba-2's
(arXiv 2405.21060), those of RWKV 4 to 7, softmax attention, or several of them."""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from vmamba_mm.checkpoints.files import fetch, read_checkpoint
from vmamba_mm.checkpoints.formats import FOLDER_FILES
from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.checkpoints.prefixes import inside
from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch, rwkv
from vmamba_mm.families.base import name_of
from vmamba_mm.families.mamba_lm import (
    FAMILY,
    arch_of_config,
    mixer_of,
    padded_vocab_size,
    with_defaults,
)
from vmamba_mm.layers import (
    CausalAttention,
    LayerNorm,
    Mamba2Mixer,
    MambaBlock,
    MambaMixer,
    RMSNorm,
    RWKV4TimeMix,
    RWKV5TimeMix,
    RWKV6TimeMix,
    RWKV7TimeMix,
    RWKVBlock,
    RWKVChannelMix,
    run_blocks,
    run_rwkv_blocks,
)
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.models.generation import generate
from vmamba_mm.models.pretrained import StrictLoading
from vmamba_mm.registry import MODELS

_MIXERS: dict[str, type[nn.Module]] = {
    'mamba': MambaMixer, 'mamba2': Mamba2Mixer, 'attention': CausalAttention,
    'rwkv4': RWKV4TimeMix, 'rwkv5': RWKV5TimeMix, 'rwkv6': RWKV6TimeMix, 'rwkv7': RWKV7TimeMix}
_NORMS: dict[str, type[nn.Module]] = {'rms': RMSNorm, 'layer': LayerNorm}


@MODELS.register_module()
class CausalLM(StrictLoading, BaseModule):
    """A language model that predicts the next token, as ``MambaLMHeadModel`` of ``mamba_ssm``.

    An embedding, ``depth`` blocks of norm and mixer around a residual stream in fp32, a norm, and a
    head that gives a logit for each token of the vocabulary. There are no positions unless
    ``max_positions`` asks for them. A block of RWKV has a channel mixing after the mixer, with a
    norm of its own, and another norm follows the embedding.

    ``CausalLM('mamba2-130m')`` is a published architecture, ``CausalLM(mixer='mamba2',
    vocab_size=256, embed_dims=64, depth=2)`` another one; :meth:`from_pretrained` builds the one
    that a checkpoint holds.

    Args:
        arch: a key of ``CausalLM.arch_settings``, or a dict with the keys of ``settings``.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``. None keeps
            the published initialisation.
        settings: keys of the arch, in place of ``arch``, or where they differ from it:

            - ``mixer``: 'mamba', 'mamba2', 'attention', 'rwkv4', 'rwkv5' (which is 5.2), 'rwkv6' or
              'rwkv7'; ``embed_dims``: channels C; ``depth``: number of blocks;
            - ``vocab_size``: the number of tokens. Embedding and head have the next multiple of
              ``pad_vocab_size_multiple`` (8; of RWKV 1) rows;
            - ``tie_embeddings`` (True; of RWKV False): the head's weight is that of the embedding;
            - ``norm`` ('rms'; of RWKV 'layer'): RMSNorm, or 'layer' for LayerNorm, with
              ``norm_eps`` (1e-5);
            - ``max_positions`` (0): learned absolute positions of so many tokens are added to the
              embedding, and no text may be longer; ``drop_rate`` (0.0): dropout after it;
            - of 'mamba': ``d_state`` (16), ``d_conv`` (4), ``expand`` (2), ``dt_rank`` ('auto'),
              ``conv_bias`` (True), ``bias`` (False), see :class:`vmamba_mm.layers.MambaMixer`;
            - of 'mamba2': ``d_state`` (128), ``d_conv`` (4), ``expand`` (2), ``head_dim`` (64),
              ``d_ssm`` (None), ``n_groups`` (1), ``rmsnorm`` (True), ``norm_before_gate`` (False),
              ``D_has_hdim`` (False), ``dt_limit`` ((0, inf)), ``conv_bias`` (True), ``bias``
              (False), see :class:`vmamba_mm.layers.Mamba2Mixer`;
            - of 'rwkv4' to 'rwkv7': ``ffn_dims`` (None for 4 C, or 3.5 C of 5 and 6), channels of
              the channel mixing; ``att_dims`` (None for C; not of 7), ``head_dim`` (64; not of 4),
              ``head_divisor`` (8; of 5 and 6), ``mix_rank`` (32; of 6), ``decay_rank`` (64 of 6),
              and of 7 ``decay_rank``, ``rate_rank``, ``value_rank`` and ``gate_rank`` (None for
              what the official trainer takes for C), see :class:`vmamba_mm.layers.RWKV7TimeMix`
              and those of the others;
            - ``attn_layers`` (()): numbers of layers, from 0, with attention in place of the mixer;
            - of 'attention' and of those layers: ``num_heads`` (1), ``num_kv_heads`` (None),
              ``attn_head_dim`` (None), ``attn_conv`` (0), ``rotary_dims`` (0), ``qkv_bias`` (True),
              ``out_bias`` (True), ``attn_drop_rate`` (0.0), which are ``num_heads``,
              ``num_kv_heads``, ``head_dim``, ``d_conv``, ``rotary_dims``, ``qkv_bias``,
              ``out_bias`` and ``drop_rate`` of :class:`vmamba_mm.layers.CausalAttention`.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    family = FAMILY
    arch_settings = FAMILY.archs

    def __init__(self, arch: str | Mapping[str, Any] | None = None, *, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None, **settings):
        super().__init__(init_cfg=init_cfg)
        if isinstance(arch, str) and settings:
            settings = {'base': arch, **settings}
        elif arch is not None:
            settings = {**arch, **settings} if isinstance(arch, Mapping) else arch
        self.arch = resolve_arch(self.family, settings)
        options = with_defaults(self.arch)
        dims, depth, rows = options['embed_dims'], options['depth'], padded_vocab_size(self.arch)
        self.vocab_size = options['vocab_size']
        self.token_embed = nn.Embedding(rows, dims)
        self.position_embed = nn.Embedding(options['max_positions'], dims) \
            if options['max_positions'] else None
        self.embed_drop = nn.Dropout(options['drop_rate'])
        make_norm = functools.partial(_NORMS[options['norm']], dims, eps=options['norm_eps'])
        self.is_rwkv = options['mixer'] in rwkv.OPTIONS
        self.embed_norm = make_norm() if self.is_rwkv else None
        make_block = _make_rwkv_block if self.is_rwkv else _make_block
        self.blocks = nn.ModuleList(
            make_block(self.arch, i, make_norm, with_cp) for i in range(depth))
        self.norm = make_norm()
        self.lm_head = nn.Linear(dims, rows, bias=False)
        self._init_parameters()
        self.is_tied = options['tie_embeddings']
        _tie(self)
        # load_state_dict(..., assign=True) makes new parameters.
        self.register_load_state_dict_post_hook(_tie)

    def _init_parameters(self) -> None:
        """As published: what feeds the residual stream starts smaller, by sqrt(depth), or of RWKV
        with zeros."""
        if self.position_embed is not None:
            nn.init.normal_(self.position_embed.weight, std=0.02)
        if self.is_rwkv:
            rows, dims = self.lm_head.weight.shape
            nn.init.orthogonal_(self.lm_head.weight, gain=0.5 * max(1, rows / dims) ** 0.5)
            nn.init.uniform_(self.token_embed.weight, -1e-4, 1e-4)
            return
        nn.init.normal_(self.token_embed.weight, std=0.02)
        for block in self.blocks:
            for projection in (block.mixer.in_proj, block.mixer.out_proj):
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(math.sqrt(len(self.blocks)))

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first token, of ``batch`` sequences: one item for each block, and,
        where there are positions, the number of tokens that each has (B)."""
        states = tuple(block.init_state(batch) for block in self.blocks)
        if self.position_embed is None:
            return states
        return *states, torch.zeros(batch, dtype=torch.long, device=self.token_embed.weight.device)

    def forward(self, input_ids: Tensor, state: Sequence[Any] | None = None,
                logits_to_keep: int = 0) -> Tensor | tuple[Tensor, tuple[Any, ...]]:
        """The logits of the token after each one.

        Args:
            input_ids: (B, L), numbers of tokens, all of them real: there is no padding.
            state: what came before: of :meth:`init_state` or of an earlier call. A call with it,
                for one token or many, costs what these take, however many came before, unless
                there is attention.
            logits_to_keep: the logits of the last so many tokens alone; 0 for those of all.

        Returns:
            (B, L, V) with V the padded vocabulary; with ``state`` also the new one. The old one is
            not changed.

        Raises:
            ValueError: if a text is longer than ``max_positions``.
        """
        hidden = self.token_embed(input_ids)
        if self.position_embed is not None:
            *state, seen = (None, None) if state is None else state
            hidden = hidden + self._positions(input_ids, seen)
            state = None if seen is None else state
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        hidden, residual, states = self._run_blocks(self.embed_drop(hidden), state)
        if state is not None and self.position_embed is not None:
            states = *states, seen + input_ids.shape[1]
        if logits_to_keep:
            hidden, residual = hidden[:, -logits_to_keep:], residual[:, -logits_to_keep:]
        normed = sum_and_norm(self.norm, residual, hidden, None)[1]
        logits = self.lm_head(normed.to(hidden.dtype))
        return logits if state is None else (logits, tuple(states))

    def _run_blocks(self, hidden, state):
        """The streams after all blocks, and the new states, if there are old ones."""
        if self.is_rwkv:
            return run_rwkv_blocks(self.blocks, hidden, state)
        if state is None:
            return *run_blocks(self.blocks, hidden), ()
        residual, states = None, []
        for block, old in zip(self.blocks, state, strict=True):
            hidden, residual, new = block(hidden, residual, state=old)
            states.append(new)
        return hidden, residual, states

    def _positions(self, input_ids, seen):
        """(L, C), or (B, L, C) after the ``seen`` (B) tokens of each text."""
        length, most = input_ids.shape[1], self.position_embed.num_embeddings
        places = torch.arange(length, device=input_ids.device)
        if seen is not None:
            places = seen[:, None] + places
        # A compiled step does not wait for the number, and the embedding refuses it.
        longest = length if seen is None or torch.compiler.is_compiling() \
            else length + int(seen.max())
        if longest > most:
            raise ValueError(f'a text of {longest} tokens is longer than max_positions={most}')
        return self.position_embed(places)

    def generate(self, input_ids: Tensor | Sequence[Tensor], max_new_tokens: int, *,
                 temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
                 eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None,
                 callback: Callable[[Tensor], Any] | None = None,
                 generator: torch.Generator | None = None) -> Tensor | list[Tensor]:
        """Continue texts: :func:`vmamba_mm.models.generation.generate` with this model."""
        return generate(self, input_ids, max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
                        callback=callback, generator=generator)

    # --- weights ----------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike, *, device: Any = 'cpu',
                        weights: str = 'auto', **kwargs) -> 'CausalLM':
        """The model that a checkpoint holds, with its weights, in fp32 and eval mode.

        Args:
            checkpoint: a folder with the ``config.json`` and weights of ``mamba_ssm`` or of
                transformers, a file in such a folder or alone, or anything else that
                :func:`vmamba_mm.checkpoints.files.read_checkpoint` takes, such as
                ``vmamba_mm://mamba_lm/mamba-130m``. Without a ``config.json`` the architecture is
                that of the weights.
            device: of the model.
            weights: as there.
            kwargs: keyword arguments of the class, in place of what the checkpoint says.

        Raises:
            UserError: if it cannot be read, describes another kind of model, or its weights are
                not all that such a model has, and no more.
        """
        path = fetch(checkpoint)
        state = read_checkpoint(path, weights, family=cls.family)
        state = state.get('state_dict', state)
        arch = _read_config(path)
        if arch is None:
            arch = infer_arch(state, cls.family)
            embedding, head = (state.get(f'backbone.{name}.weight')
                               for name in ('token_embed', 'lm_head'))
            is_tied = with_defaults(resolve_arch(cls.family, arch))['tie_embeddings']
            if is_tied and not _is_same(embedding, head):
                kwargs = {'tie_embeddings': False, **kwargs}
            if 'num_heads' not in kwargs and _guesses_heads(arch):
                raise UserError(f'{checkpoint}: the weights do not tell how many heads the '
                                'attention has; give from_pretrained its num_heads (and '
                                'rotary_dims, if there are any), or the folder with config.json')
        try:
            with torch.device('meta'):  # initial values would take longer than the file
                model = cls(arch, **kwargs)
        except ValueError as err:
            raise UserError(f'{checkpoint} holds no model that can be built: {err}') from err
        _tie(model.to_empty(device=device))
        try:
            model.load_state_dict(inside(state, 'backbone.') or state)
        except UserError as err:
            raise UserError(f'{checkpoint}: {err}') from err
        return model.eval()

    def complete_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with a tied head, which transformers leaves out of a file."""
        embedding, head = weights.get('token_embed.weight'), weights.get('lm_head.weight')
        if not self.is_tied or embedding is None:
            return weights
        if not _is_same(embedding, head):
            raise UserError('lm_head.weight differs from the embedding: give the model '
                            'tie_embeddings=False, or build it with CausalLM.from_pretrained')
        return {**weights, 'lm_head.weight': embedding}

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        with torch.device('meta'):
            return CausalLM(self.arch if arch is None else arch).state_dict()


def _make_mixer(arch: Mapping[str, Any], layer: int) -> nn.Module:
    kind, options = mixer_of(arch, layer)
    return _MIXERS[kind](arch['embed_dims'], **options)


def _make_block(arch: Mapping[str, Any], layer: int, make_norm: Callable[[], nn.Module],
                with_cp: bool) -> MambaBlock:
    return MambaBlock(_make_mixer(arch, layer), make_norm(), with_cp=with_cp)


def _make_rwkv_block(arch: Mapping[str, Any], layer: int, make_norm: Callable[[], nn.Module],
                     with_cp: bool) -> RWKVBlock:
    channel_mixer = RWKVChannelMix(arch['embed_dims'], **rwkv.channel_options(arch, layer))
    return RWKVBlock(_make_mixer(arch, layer), channel_mixer, make_norm(), make_norm(), with_cp)


def _guesses_heads(arch: str | Mapping[str, Any]) -> bool:
    """Whether an arch that was told from weights has attention, and is not a published one."""
    return not isinstance(arch, str) and name_of(FAMILY, arch) is None \
        and (arch['mixer'] == 'attention' or 'attn_layers' in arch)


def _tie(model: CausalLM, _: Any = None) -> None:
    """Make the head's weight that of the embedding, where the model ties them."""
    if model.is_tied:
        model.lm_head.weight = model.token_embed.weight


def _is_same(embedding: Tensor | None, head: Tensor | None) -> bool:
    """Whether a head is absent or has the weights of the embedding, as far as can be told."""
    return embedding is None or head is None or embedding.is_meta or head.is_meta \
        or embedding.shape != head.shape or torch.equal(embedding, head.to(embedding))


def _read_config(path: Path) -> dict[str, Any] | None:
    """The arch of the ``config.json`` in a checkpoint's folder; None if there is none."""
    if path.is_dir():
        path = path / 'config.json'
    elif path.name in FOLDER_FILES:
        path = path.with_name('config.json')
    else:
        return None
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        return resolve_arch(FAMILY, arch_of_config(config))
    except KeyError as err:
        raise UserError(f'{path} lacks {err}: it is not the config.json of a language model of '
                        'mamba_ssm or transformers') from err
    except (AttributeError, TypeError, ValueError) as err:
        raise UserError(f'{path} cannot be used: {err}') from err
