"""A causal language model over the mixers of this package: Mamba's (arXiv 2312.00752), Mamba-2's
(arXiv 2405.21060), those of RWKV 4 to 7, RetNet's, softmax attention, or some with attention and
with mixtures of experts, as Jamba (arXiv 2403.19887)."""

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

from vmamba_mm.checkpoints.files import fetch, read_checkpoint, select_weights
from vmamba_mm.checkpoints.formats import FOLDER_FILES
from vmamba_mm.checkpoints.lazy import LazyWeights, open_lazily
from vmamba_mm.checkpoints.names import infer_arch
from vmamba_mm.checkpoints.prefixes import inside
from vmamba_mm.errors import UserError
from vmamba_mm.families import resolve_arch
from vmamba_mm.families.mamba_lm import (
    FAMILY,
    arch_of_config,
    mixers_of,
    padded_vocab_size,
    with_defaults,
)
from vmamba_mm.layers import LayerNorm, MambaBlock, RMSNorm, run_blocks
from vmamba_mm.layers.norm import sum_and_norm
from vmamba_mm.models.causal_blocks import init_parameters, make_block
from vmamba_mm.models.generation import generate
from vmamba_mm.models.pretrained import StrictLoading, check_fits, is_same
from vmamba_mm.registry import MODELS

_NORMS: dict[str, type[nn.Module]] = {'rms': RMSNorm, 'layer': LayerNorm}


@MODELS.register_module()
class CausalLM(StrictLoading, BaseModule):
    """A language model that predicts the next token, as ``MambaLMHeadModel`` of ``mamba_ssm``.

    An embedding, ``depth`` blocks of norm and mixer around a residual stream in fp32, a norm, and a
    head that gives a logit for each token of the vocabulary. There are no positions unless
    ``max_positions`` asks for them. After the mixer, blocks of RWKV have a channel mixing and those
    of RetNet and Jamba a gated MLP, or of Jamba a mixture of experts, with a norm of its own.

    ``CausalLM('mamba2-130m')`` is a published architecture, ``CausalLM(mixer='mamba2',
    vocab_size=256, embed_dims=64, depth=2)`` another one, and ``CausalLM(vocab_size=256,
    embed_dims=64, layers=['mamba', 'mamba+moe', 'attention', 'mamba+moe'])`` a hybrid in the way
    of Jamba; :meth:`from_pretrained` builds the one that a checkpoint holds.

    Args:
        arch: a key of ``CausalLM.arch_settings``, or a dict with the keys of ``settings``.
        with_cp: recompute each block in the backward pass (gradient checkpointing).
        init_cfg: mmengine's, for example ``dict(type='Pretrained', checkpoint=...)``. None keeps
            the published initialisation.
        settings: keys of the arch, in place of ``arch``, or where they differ from it:

            - ``mixer``: 'mamba', 'mamba2', 'attention', 'rwkv4', 'rwkv5' (which is 5.2), 'rwkv6',
              'rwkv7', 'retnet' or 'jamba'; ``embed_dims``: channels C; ``depth``: number of blocks;
            - ``vocab_size``: the number of tokens. Embedding and head have the next multiple of
              ``pad_vocab_size_multiple`` (8; of RWKV, RetNet and Jamba 1) rows;
            - ``tie_embeddings`` (True; of RWKV, RetNet and Jamba False): the head's weight is that
              of the embedding;
            - ``norm`` ('rms'; of RWKV 'layer'): RMSNorm, or 'layer' for LayerNorm, with
              ``norm_eps`` (1e-5; of RetNet and Jamba 1e-6); ``embed_norm`` (False; of RWKV True):
              another norm follows the embedding;
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
            - of 'retnet': ``retention_heads`` (1), ``value_dims`` (None for 5 C / 3, rounded down
              to a multiple of the heads) and ``retention_form`` ('chunkwise'), which are
              ``num_heads``, ``value_dims`` and ``form`` of
              :class:`vmamba_mm.layers.MultiScaleRetention`; ``ffn_dims`` (None for those of the
              values, 0 for no MLP) and ``ffn_act`` ('gelu' or 'silu') of the MLP; ``deepnorm``
              (False), ``post_norm`` (False) and ``scale_embedding`` (False) by sqrt(C);
            - of 'jamba': ``layers`` (None), for each layer 'mamba' or 'attention', with '+moe' for
              a mixture of experts in place of the MLP; None for attention in the fifth of every
              eight layers, and experts in every second one, as published. With ``layers``,
              ``mixer`` and ``depth`` need not be given. ``d_state`` to ``bias`` as of 'mamba', with
              norms of dt, B and C; ``num_heads`` and ``num_kv_heads`` as of 'attention', without
              biases; ``ffn_dims`` (None for 3.5 C) of MLPs and of each of ``num_experts`` (16), of
              which a token goes through ``experts_per_token`` (2);
            - ``attn_layers`` (()): numbers of layers, from 0, of 'mamba' or 'mamba2' with attention
              in place of the mixer;
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
        if isinstance(settings, dict) and settings.get('layers') and 'base' not in settings:
            settings = {'mixer': 'jamba', 'depth': len(settings['layers']), **settings}
        self.arch = resolve_arch(self.family, settings)
        options = with_defaults(self.arch)
        dims, depth, rows = options['embed_dims'], options['depth'], padded_vocab_size(self.arch)
        self.vocab_size = options['vocab_size']
        self.token_embed = nn.Embedding(rows, dims)
        self.position_embed = nn.Embedding(options['max_positions'], dims) \
            if options['max_positions'] else None
        self.embed_drop = nn.Dropout(options['drop_rate'])
        make_norm = functools.partial(_NORMS[options['norm']], dims, eps=options['norm_eps'])
        self.embed_norm = make_norm() if options['embed_norm'] else None
        self.embed_scale = math.sqrt(dims) if options.get('scale_embedding') else None
        self.blocks = nn.ModuleList(
            make_block(self.arch, i, make_norm, with_cp) for i in range(depth))
        self.norm = None if options.get('post_norm') else make_norm()
        self.lm_head = nn.Linear(dims, rows, bias=False)
        init_parameters(self)
        self.is_tied = options['tie_embeddings']
        _tie(self)
        # load_state_dict(..., assign=True) makes new parameters.
        self.register_load_state_dict_post_hook(_tie)

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first token, of ``batch`` sequences: one item for each block, and,
        where there are positions, the number of tokens that each has (B)."""
        states = tuple(block.init_state(batch) for block in self.blocks)
        if self.position_embed is None:
            return states
        return *states, torch.zeros(batch, dtype=torch.long, device=self.token_embed.weight.device)

    def forward(self, input_ids: Tensor | None, state: Sequence[Any] | None = None,
                logits_to_keep: int = 0, embeds: Tensor | None = None
                ) -> Tensor | tuple[Tensor, tuple[Any, ...]]:
        """The logits of the token after each one.

        Args:
            input_ids: (B, L), numbers of tokens, all of them real: there is no padding.
            state: what came before: of :meth:`init_state` or of an earlier call. A call with it,
                for one token or many, costs what these take, however many came before, unless
                there is attention.
            logits_to_keep: the logits of the last so many tokens alone; 0 for those of all.
            embeds: (B, L, C), vectors in the place of the embeddings of tokens, such as those of
                an image; ``input_ids`` is None then.

        Returns:
            (B, L, V) with V the padded vocabulary; with ``state`` also the new one. The old one is
            not changed.

        Raises:
            ValueError: if a text is longer than ``max_positions``.
        """
        hidden = self.token_embed(input_ids) if embeds is None else embeds
        if self.embed_scale is not None:
            hidden = hidden * self.embed_scale
        if self.position_embed is not None:
            *state, seen = (None, None) if state is None else state
            hidden = hidden + self._positions(hidden, seen)
            state = None if seen is None else state
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden).to(hidden.dtype)
        hidden, residual, states = self._run_blocks(self.embed_drop(hidden), state)
        if state is not None and self.position_embed is not None:
            states = *states, seen + hidden.shape[1]
        if logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
            residual = None if residual is None else residual[:, -logits_to_keep:]
        normed = hidden if self.norm is None else sum_and_norm(self.norm, residual, hidden)[1]
        logits = self.lm_head(normed.to(hidden.dtype))
        return logits if state is None else (logits, tuple(states))

    def _run_blocks(self, hidden, state):
        """The first two streams after all blocks, and the new states, none without old ones."""
        if state is None and all(type(block) is MambaBlock for block in self.blocks):
            return *run_blocks(self.blocks, hidden), ()  # which may be one op
        streams, states = (hidden,), []
        for block, old in zip(self.blocks, [None] * len(self.blocks) if state is None else state,
                              strict=True):
            if old is None:
                streams = block(*streams)
            else:
                *streams, new = block(*streams, state=old)
                states.append(new)
        return *streams[:2], tuple(states)

    def _positions(self, hidden, seen):
        """(L, C), or (B, L, C) after the ``seen`` (B) tokens of each text."""
        length, most = hidden.shape[1], self.position_embed.num_embeddings
        places = torch.arange(length, device=hidden.device)
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
                        dtype: torch.dtype | str = torch.float32, weights: str = 'auto',
                        **kwargs) -> 'CausalLM':
        """The model that a checkpoint holds, with its weights, in eval mode.

        Safetensors, in one file or several, are read one weight at a time, straight into the
        model: beside it there is never more than the largest of them in memory.

        Args:
            checkpoint: a folder with the ``config.json`` and weights of ``mamba_ssm`` or of
                transformers, a file in such a folder or alone, or anything else that
                :func:`vmamba_mm.checkpoints.files.read_checkpoint` takes, such as
                ``vmamba_mm://mamba_lm/mamba-130m``. Without a ``config.json`` the architecture is
                that of the weights.
            device: of the model.
            dtype: of the model, or 'auto' for that of the embedding in the file. Scans, norms and
                the residual stream are calculated in fp32 at least, whatever it is.
            weights: as there.
            kwargs: keyword arguments of the class, in place of what the checkpoint says.

        Raises:
            ValueError: on another ``dtype`` that is a string.
            UserError: if it cannot be read, describes another kind of model, or its weights are
                not all that such a model has, and no more.
        """
        if isinstance(dtype, str) and dtype != 'auto':
            raise ValueError(f"dtype={dtype!r} does not exist; give a dtype of torch, or 'auto'")
        path = fetch(checkpoint)
        lazy = open_lazily(path)
        if lazy is None:
            state = read_checkpoint(path, weights, family=cls.family)
        else:
            content = dict(meta=lazy.meta, state_dict=lazy.shapes)
            state = select_weights(content, weights, path, family=cls.family)
        state = state.get('state_dict', state)
        arch = _read_config(path)
        if arch is None:
            arch, kwargs = cls._inferred(state, lazy, checkpoint, kwargs)
        try:
            with torch.device('meta'):  # initial values would take longer than the file
                model = cls(arch, **kwargs)
        except ValueError as err:
            raise UserError(f'{checkpoint} holds no model that can be built: {err}') from err
        state = inside(state, 'backbone.') or state
        if dtype == 'auto':
            embedding = state.get('token_embed.weight')
            dtype = torch.float32 if embedding is None else embedding.dtype
        try:
            if lazy is None:
                _tie(model.to(dtype).to_empty(device=device))
                model.load_state_dict(state)
            else:
                state = model.complete_weights(state)
                check_fits(model, state, 'the state dict', True, is_whole=True)
                _tie(model.to(dtype).to_empty(device=device))
                _fill(model, state, lazy)
        except UserError as err:
            raise UserError(f'{checkpoint}: {err}') from err
        return model.eval()

    @classmethod
    def _inferred(cls, state, lazy, checkpoint, kwargs):
        """The arch that weights tell, and the arguments with what they tell beside it."""
        arch = infer_arch(state, cls.family)
        embedding, head = (state.get(f'backbone.{name}.weight')
                           for name in ('token_embed', 'lm_head'))
        if lazy is not None and embedding is not None and head is not None:
            names = [k for k, v in lazy.shapes.items() if v is embedding or v is head]
            embedding, *head = [tensor for _, tensor in lazy.read(*names)]
            head = head[0] if head else embedding
        is_tied = is_same(embedding, head)
        settings = resolve_arch(cls.family, arch)
        if is_tied != with_defaults(settings)['tie_embeddings']:
            kwargs = {'tie_embeddings': is_tied, **kwargs}
        option, explanation = mixers_of(settings).untold(settings)
        is_published = isinstance(arch, str)
        if option and option not in kwargs and not is_published:
            raise UserError(f'{checkpoint}: the weights do not tell {explanation}')
        return arch, kwargs

    def complete_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights with a tied head, which transformers leaves out of a file."""
        embedding, head = weights.get('token_embed.weight'), weights.get('lm_head.weight')
        if not self.is_tied or embedding is None:
            return weights
        if not is_same(embedding, head):
            raise UserError('lm_head.weight differs from the embedding: give the model '
                            'tie_embeddings=False, or build it with CausalLM.from_pretrained')
        return {**weights, 'lm_head.weight': embedding}

    def plain_state(self, arch: str | Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        with torch.device('meta'):
            return CausalLM(self.arch if arch is None else arch).state_dict()


def _tie(model: CausalLM, _: Any = None) -> None:
    """Make the head's weight that of the embedding, where the model ties them."""
    if model.is_tied:
        model.lm_head.weight = model.token_embed.weight


@torch.no_grad()
def _fill(model: CausalLM, state: Mapping[str, Tensor], lazy: LazyWeights) -> None:
    """Read all weights into a model, one after the other.

    Args:
        state: of the model by its names, on the device meta, as in ``lazy.shapes``.
        lazy: the files.
    """
    ours, parameters = {id(value): name for name, value in state.items()}, model.state_dict()
    targets = {name: ours.get(id(value)) for name, value in lazy.shapes.items()}
    for name, tensor in lazy.read():
        if targets[name] is not None:
            parameters[targets[name]].copy_(tensor)


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
