"""The blocks Mamba2 and Mamba2Simple of mamba_ssm 2."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.integrations.dropin.conv import causal_conv1d_update, convolve_sequences
from vmamba_mm.integrations.dropin.mamba_simple import states_from_cache
from vmamba_mm.integrations.dropin.norms_gated import RMSNorm
from vmamba_mm.integrations.dropin.ssd import (
    NO_LIMIT,
    in_heads,
    mamba_chunk_scan_combined,
    scan,
    split_projection,
)
from vmamba_mm.layers.ssm_init import init_dt_bias, state_matrix
from vmamba_mm.ops import ssd_step
from vmamba_mm.ops.core.backends import compute_dtype


class _Block(nn.Module):
    """What both have: parameters with official names, order and initial values, and the way through
    them. ``in_proj``, ``norm`` and ``out_proj`` are called as modules, so that hooks work."""

    def __init__(self, *, d_model, d_state, d_conv, conv_init, expand, headdim, d_ssm=None, ngroups,
                 A_init_range, D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
                 learnable_init_states=False, dt_min, dt_max, dt_init_floor, dt_limit, bias,
                 conv_bias, chunk_size, use_mem_eff_path, layer_idx, device, dtype):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.conv_init = (d_model, d_state, d_conv,
                                                                   conv_init)
        self.expand, self.headdim, self.ngroups = expand, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim or self.d_ssm // headdim % ngroups:
            raise ValueError(f'headdim={headdim} must divide the {self.d_ssm} channels of the scan '
                             f'and ngroups={ngroups} the heads')
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f'A_init_range must be two numbers above 0, the smaller first, got '
                             f'{A_init_range}')
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm = D_has_hdim, rmsnorm
        self.norm_before_gate, self.learnable_init_states = norm_before_gate, learnable_init_states
        self.dt_limit, self.activation, self.chunk_size = tuple(dt_limit), 'silu', chunk_size
        self.use_mem_eff_path, self.layer_idx = use_mem_eff_path, layer_idx
        options = dict(device=device, dtype=dtype)

        channels = self.d_ssm + 2 * ngroups * d_state
        width = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, **options)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1,
                                bias=conv_bias, **options)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        if learnable_init_states:
            self.init_states = nn.Parameter(
                torch.zeros(self.nheads, headdim, d_state, **options))
        self.act = nn.SiLU()
        dt_bias = init_dt_bias(1, self.nheads, dt_min, dt_max, dt_init_floor)[0]
        self.dt_bias = nn.Parameter(dt_bias.to(**options))
        A = torch.empty(self.nheads, device=device).uniform_(*A_init_range)
        self.A_log = nn.Parameter(A.log().to(dtype))
        # In fp32 whatever the dtype.
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True
        if rmsnorm:
            self.norm = RMSNorm(self.d_ssm, eps=1e-5, norm_before_gate=norm_before_gate,
                                group_size=self.d_ssm // ngroups, **options)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **options)

    def _split(self, zxbcdt):
        return split_projection(zxbcdt, self.d_ssm, self.conv1d.in_channels, self.nheads)

    def _mix(self, parts, seq_idx, initial_state=None):
        """(B, L, d_inner) before ``out_proj``, the scan's input xBC, and its final state."""
        xBC = convolve_sequences(parts.xBC, self.conv1d.weight[:, 0], self.conv1d.bias, seq_idx,
                                 'silu')
        y, state = scan(xBC, parts.dt, state_matrix(self.A_log), self._D(), self.dt_bias,
                        self.d_ssm, self.ngroups, None if self.rmsnorm else parts.z,
                        dt_limit=self.dt_limit, initial_state=initial_state, seq_idx=seq_idx)
        return self._around(y, parts), xBC, state

    def _around(self, y, parts):
        """The norm with the gate, and the MLP part before it."""
        if self.rmsnorm:
            y = self.norm(y, parts.z)
        return y if parts.mlp is None else torch.cat([parts.mlp, y], dim=-1)

    def _D(self):
        return in_heads(self.D, self.nheads) if self.D_has_hdim else self.D


class Mamba2(_Block):
    """The block of Mamba-2 of mamba_ssm, whose files, optimizer states and seeds fit.

    Args:
        d_model: C, channels of a token.
        d_state: N. d_conv: width of the convolution. expand: D / C. headdim: P. ngroups: G.
        conv_init: the convolution's weights start within it; None for the default of torch.
        d_ssm: channels that go through the scan, the others being a gated MLP; None for all.
        A_init_range: between which -A starts.
        D_has_hdim: D has a value for each channel.
        rmsnorm: a norm with the gate behind the scan. norm_before_gate: it comes before the gate.
        dt_min, dt_max, dt_init_floor: dt starts log-uniform between the first two, at least at the
            third. dt_limit: the least and the greatest dt; in decoding too, where mamba_ssm has no
            limits.
        bias, conv_bias: of the two outer projections, and of the convolution.
        chunk_size, use_mem_eff_path: have no effect; every path has the same results.
        layer_idx: the key of this layer's state in ``inference_params``.
        process_group, sequence_parallel: the first must be None: there is no tensor parallelism.

    Raises:
        ValueError: on sizes that do not divide each other.
        NotImplementedError: on a ``process_group``.
    """

    def __init__(self, d_model: int, d_state: int = 128, d_conv: int = 4,
                 conv_init: float | None = None, expand: float = 2, headdim: int = 64,
                 d_ssm: int | None = None, ngroups: int = 1,
                 A_init_range: tuple[float, float] = (1, 16), D_has_hdim: bool = False,
                 rmsnorm: bool = True, norm_before_gate: bool = False, dt_min: float = 0.001,
                 dt_max: float = 0.1, dt_init_floor: float = 1e-4,
                 dt_limit: tuple[float, float] = NO_LIMIT, bias: bool = False,
                 conv_bias: bool = True, chunk_size: int = 256, use_mem_eff_path: bool = True,
                 layer_idx: int | None = None, process_group=None, sequence_parallel: bool = True,
                 device=None, dtype: torch.dtype | None = None):
        if process_group is not None:
            raise NotImplementedError('Mamba2 of vmamba_mm.dropin has no tensor parallelism: '
                                      'process_group must be None')
        super().__init__(
            d_model=d_model, d_state=d_state, d_conv=d_conv, conv_init=conv_init, expand=expand,
            headdim=headdim, d_ssm=d_ssm, ngroups=ngroups, A_init_range=A_init_range,
            D_has_hdim=D_has_hdim, rmsnorm=rmsnorm, norm_before_gate=norm_before_gate,
            dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias,
            conv_bias=conv_bias, chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = None, sequence_parallel

    def forward(self, u: Tensor, seqlen: int | None = None, seq_idx: Tensor | None = None,
                cu_seqlens: Tensor | None = None, inference_params=None) -> Tensor:
        """(B, L, C) to (B, L, C), or (B * L, C) with ``seqlen`` L.

        Args:
            seq_idx: (B, L), the number of each token's sequence where a row holds several.
            cu_seqlens: (sequences + 1), where the sequences of a single row begin and end, for a
                state of each in ``inference_params``.
            inference_params: with ``seqlen_offset``, the tokens seen so far, and
                ``key_value_memory_dict``, where this layer keeps its state; None outside of
                decoding.
        """
        batch = len(u) if seqlen is None else len(u) // seqlen
        if inference_params is not None:
            count = batch if cu_seqlens is None else len(cu_seqlens) - 1
            states = self._get_states_from_cache(inference_params, count)
            if inference_params.seqlen_offset > 0:
                return self.step(u, *states)[0]
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.unflatten(0, (batch, seqlen))
        parts = self._split(zxbcdt)
        y, xBC, last = self._mix(parts, seq_idx)
        if inference_params is not None:
            self._keep(states, parts, xBC, last, cu_seqlens)
        return self.out_proj(y if seqlen is None else y.flatten(0, 1))

    def _keep(self, states, parts, xBC, last, cu_seqlens):
        """Write what decoding starts from into ``states``, (sequences, ...) with ``cu_seqlens``."""
        conv_state, ssm_state = states
        raw = parts.xBC.transpose(1, 2)
        if cu_seqlens is None:
            conv_state.copy_(F.pad(raw, (self.d_conv - raw.shape[-1], 0)))
            ssm_state.copy_(last)
            return
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], dim=-1)
        _, of_sequences = mamba_chunk_scan_combined(
            in_heads(x, self.nheads), parts.dt, state_matrix(self.A_log), in_heads(B, self.ngroups),
            in_heads(C, self.ngroups), self.chunk_size, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=self.dt_limit, cu_seqlens=cu_seqlens, return_varlen_states=True)
        ssm_state.copy_(of_sequences)
        conv_state.copy_(torch.stack([
            F.pad(raw[0, :, start:end], (self.d_conv - (end - start), 0))
            for start, end in pairwise(cu_seqlens.tolist())]))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, C) to (B, 1, C); the states are changed in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError('Mamba2 decodes one token at a time, got a sequence of '
                             f'{hidden_states.shape[1]}')
        parts = self._split(self.in_proj(hidden_states[:, 0]))
        xBC = causal_conv1d_update(parts.xBC, conv_state, self.conv1d.weight[:, 0],
                                   self.conv1d.bias, 'silu')
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], dim=-1)
        y, new = ssd_step(
            ssm_state.to(compute_dtype(x.dtype)), in_heads(x, self.nheads), parts.dt,
            state_matrix(self.A_log), in_heads(B, self.ngroups), in_heads(C, self.ngroups),
            self._D(), z=None if self.rmsnorm else in_heads(parts.z, self.nheads),
            dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit)
        ssm_state.copy_(new)
        y = self.out_proj(self._around(y.flatten(1), parts))
        return y.unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int,
                                 dtype: torch.dtype | None = None, **kwargs
                                 ) -> tuple[Tensor, Tensor]:
        """States for ``batch_size`` sequences: the last inputs of the convolution (B, d_ssm + 2GN,
        W) and the scan's (B, H, P, N). ``max_seqlen`` has no effect: they do not grow."""
        conv, weight = self.conv1d.weight, self.in_proj.weight
        return (conv.new_zeros(batch_size, len(conv), self.d_conv, dtype=dtype),
                weight.new_zeros(batch_size, self.nheads, self.headdim, self.d_state, dtype=dtype))

    def _get_states_from_cache(self, inference_params, batch_size: int,
                               initialize_states: bool = False) -> tuple[Tensor, Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)


class Mamba2Simple(_Block):
    """The simple block of Mamba-2 of mamba_ssm.

    With several groups the norm is of each group by itself, as by mamba_ssm's default path.

    Args:
        learnable_init_states: the state before the first token is a parameter.
        activation: of the convolution, 'swish' or 'silu' (the same).
        deterministic: has no effect: all results can be repeated.
        others: as of :class:`Mamba2`.

    Raises:
        ValueError: on sizes that do not divide each other.
        NotImplementedError: on another ``activation``.
    """

    def __init__(self, d_model: int, d_state: int = 64, d_conv: int = 4,
                 conv_init: float | None = None, expand: float = 2, headdim: int = 128,
                 ngroups: int = 1, A_init_range: tuple[float, float] = (1, 16),
                 dt_min: float = 0.001, dt_max: float = 0.1, dt_init_floor: float = 1e-4,
                 dt_limit: tuple[float, float] = NO_LIMIT, learnable_init_states: bool = False,
                 activation: str = 'swish', bias: bool = False, conv_bias: bool = True,
                 chunk_size: int = 256, use_mem_eff_path: bool = True,
                 deterministic: bool | None = None, layer_idx: int | None = None, device=None,
                 dtype: torch.dtype | None = None):
        if activation not in ('silu', 'swish'):
            raise NotImplementedError(f"activation must be 'silu' or 'swish', got {activation!r}")
        super().__init__(
            d_model=d_model, d_state=d_state, d_conv=d_conv, conv_init=conv_init, expand=expand,
            headdim=headdim, ngroups=ngroups, A_init_range=A_init_range,
            learnable_init_states=learnable_init_states, dt_min=dt_min, dt_max=dt_max,
            dt_init_floor=dt_init_floor, dt_limit=dt_limit, bias=bias, conv_bias=conv_bias,
            chunk_size=chunk_size, use_mem_eff_path=use_mem_eff_path, layer_idx=layer_idx,
            device=device, dtype=dtype)
        self.activation, self.deterministic = activation, deterministic

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        first = None
        if self.learnable_init_states:
            first = self.init_states.to(compute_dtype(u.dtype)).expand(len(u), -1, -1, -1)
        return self.out_proj(self._mix(self._split(self.in_proj(u)), seq_idx, first)[0])
