"""The mixer of Mamba-2, whose scan is state space duality (arXiv 2405.21060, section 7)."""

import math
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.mamba import convolve, is_causal_conv
from vmamba_mm.layers.norm import RMSNormGated
from vmamba_mm.layers.ssm_init import init_dt_bias, state_matrix
from vmamba_mm.ops import causal_conv_step, ssd, ssd_step
from vmamba_mm.ops.core.backends import compute_dtype

# What torch.fx records as it is, since it looks at shapes and dtypes.
torch.fx.wrap('_first_state')
torch.fx.wrap('ssd')
torch.fx.wrap('state_matrix')


class Mamba2State(NamedTuple):
    """What a causal mixer of Mamba-2 keeps of the tokens that it has seen."""

    conv: Tensor  #: (B, d_conv - 1, d_ssm + 2GN), the last inputs of the convolution, oldest first
    ssm: Tensor  #: (B, H, P, N), the state of the scan: fp32, or fp64 in a model of that dtype


class Mamba2Mixer(nn.Module):
    """The mixer of Mamba-2, which sees what came before (figure 6 of arXiv 2405.21060).

    ``in_proj`` gives z, x, B, C and dt at once. x, B and C go through a causal depthwise
    convolution with SiLU, then x through the scan ``ssd``, whose decay is one number for each of H
    heads of P channels. Its result is multiplied by SiLU(z) and normalised before ``out_proj``.
    Parameters have the official names and order.

    Args:
        embed_dims: C, channels of a token.
        d_state: N, size of the state of one channel.
        d_conv: W, width of the causal convolution.
        expand: D / C, with D the channels before ``out_proj``.
        head_dim: P, channels of a head.
        d_ssm: how many of the D channels go through the scan; None for all. The others are a gated
            MLP beside it: SiLU of one half of what ``in_proj`` gives for them, times the other.
        n_groups: G, groups of heads that share B and C. It must divide H = d_ssm / P.
        rmsnorm: whether the gated result is normalised.
        norm_before_gate: whether SiLU(z) multiplies the normalised result instead.
        D_has_hdim: D has a value for every channel, not for every head.
        dt_limit: least and greatest dt, after softplus.
        learnable_init_states: the state before the first token is a parameter, ``init_states`` (H,
            P, N), which starts with zeros.
        conv_bias: whether the convolution has a bias.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        A_init_range: between which -A starts, uniformly.
        dt_min, dt_max, dt_init_floor: between which dt starts, log-uniformly, and the least that it
            starts with.
        conv_init: half the width of the interval in which the convolution's weights start; None for
            that of ``nn.Conv1d``.

    Shape: (B, L, C) -> (B, L, C), with a state that and the :class:`Mamba2State` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, d_state: int = 128, d_conv: int = 4, expand: float = 2,
                 head_dim: int = 64, d_ssm: int | None = None, n_groups: int = 1, *,
                 rmsnorm: bool = True, norm_before_gate: bool = False, D_has_hdim: bool = False,
                 dt_limit: tuple[float, float] = (0.0, math.inf),
                 learnable_init_states: bool = False, conv_bias: bool = True, bias: bool = False,
                 A_init_range: tuple[float, float] = (1, 16), dt_min: float = 1e-3,
                 dt_max: float = 0.1, dt_init_floor: float = 1e-4, conv_init: float | None = None):
        super().__init__()
        inner = int(expand * embed_dims)
        d_ssm = inner if d_ssm is None else d_ssm
        if d_state < 1 or d_conv < 2:
            raise ValueError(f'd_state must be at least 1 and d_conv at least 2, got {d_state!r} '
                             f'and {d_conv!r}')
        if not 1 <= d_ssm <= inner:
            raise ValueError(f'd_ssm must be at least 1 and at most expand * embed_dims = {inner}, '
                             f'got {d_ssm!r}')
        if head_dim < 1 or d_ssm % head_dim:
            raise ValueError(f'head_dim={head_dim!r} must divide the {d_ssm} channels of the scan '
                             '(d_ssm, or expand * embed_dims)')
        heads = d_ssm // head_dim
        if n_groups < 1 or heads % n_groups:
            raise ValueError(f'n_groups={n_groups!r} must divide the {heads} heads')
        low, high = dt_limit
        if not 0 <= low <= high:
            raise ValueError('dt_limit must be two numbers of at least 0, the smaller first, got '
                             f'{dt_limit!r}')
        self.d_ssm, self.d_mlp, self.d_state, self.d_conv = d_ssm, inner - d_ssm, d_state, d_conv
        self.num_heads, self.head_dim, self.n_groups = heads, head_dim, n_groups
        self.D_has_hdim, self.dt_limit = D_has_hdim, (float(low), float(high))
        channels = d_ssm + 2 * n_groups * d_state
        self.in_proj = nn.Linear(embed_dims, 2 * self.d_mlp + d_ssm + channels + heads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, padding=d_conv - 1, groups=channels,
                                bias=conv_bias)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.register_parameter('init_states', nn.Parameter(torch.zeros(
            heads, head_dim, d_state)) if learnable_init_states else None)
        self.dt_bias = nn.Parameter(init_dt_bias(1, heads, dt_min, dt_max, dt_init_floor)[0])
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(d_ssm if D_has_hdim else heads))
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True
        self.norm = RMSNormGated(d_ssm, d_ssm // n_groups, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(inner, embed_dims, bias=bias)

    def forward(self, x: Tensor, state: Mamba2State | None = None, *,
                seq_idx: Tensor | None = None) -> Tensor | tuple[Tensor, Mamba2State]:
        """The mixer's result, and the new state if one is given, which is not changed.

        Args:
            x: (B, L, C).
            state: what :meth:`init_state`, :meth:`step` or an earlier call returned, for the
                tokens before ``x``; None if there are none and nothing comes after.
            seq_idx: (B, L), int32, of rows with several sequences one after the other: the number
                of each token's sequence, beginning with 0. No token sees another sequence. What
                came before belongs to sequence 0, and the new state to the last one.
        """
        if state is not None and seq_idx is None and x.shape[1] == 1 \
                and is_causal_conv(self.conv1d):
            return self._one_token(x, state)
        mlp, z, xBC, dt = self._project(x)
        tail = None if state is None else state.conv.to(xBC.dtype)
        inputs = self._scan_inputs(self._convolve(xBC, tail, seq_idx), z, dt)
        if state is None:
            first = None if self.init_states is None else _first_state(self.init_states, x)
            return self._project_out(ssd(**inputs, initial_state=first, seq_idx=seq_idx), z, mlp)
        y, ssm = ssd(**inputs, initial_state=state.ssm, seq_idx=seq_idx, return_final_state=True)
        return self._project_out(y, z, mlp), Mamba2State(self._tail(tail, xBC, seq_idx), ssm)

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One more token.

        Args:
            x: (B, C).
            state: of the tokens before.

        Returns:
            (B, C) and the new state; the old one is not changed.
        """
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def init_state(self, batch: int) -> Mamba2State:
        """The state before the first token, of ``batch`` sequences."""
        shape = batch, self.num_heads, self.head_dim, self.d_state
        dtype = compute_dtype(self.A_log.dtype)
        return Mamba2State(
            self.A_log.new_zeros(batch, self.d_conv - 1, self.conv1d.in_channels),
            self.A_log.new_zeros(shape, dtype=dtype) if self.init_states is None
            else self.init_states.to(dtype).repeat(batch, 1, 1, 1))

    # --- the parts --------------------------------------------------------------------------------

    def _project(self, x):
        """The MLP part or None, z, what is convolved, and dt, each (B, L, its channels)."""
        widths = self.d_ssm, self.conv1d.in_channels, self.num_heads
        if not self.d_mlp:
            z, xBC, dt = self.in_proj(x).split(widths, dim=-1)
            return None, z, xBC, dt
        gate, value, z, xBC, dt = self.in_proj(x).split((self.d_mlp, self.d_mlp, *widths), dim=-1)
        return F.silu(gate) * value, z, xBC, dt

    def _convolve(self, x, tail=None, seq_idx=None):
        """The causal convolution and SiLU, (B, L, D), after ``tail`` (B, W - 1, D), or zeros."""
        conv, width = self.conv1d, self.d_conv
        if seq_idx is None:
            return convolve(conv, x, tail)
        windows = own_windows(x, seq_idx, width, tail)
        y = F.conv1d(windows, conv.weight, conv.bias, groups=conv.groups) \
            if is_causal_conv(conv) else conv(windows)[..., width - 1:width]
        return F.silu(y).view_as(x)

    def _tail(self, tail, x, seq_idx):
        """The last W - 1 inputs of the convolution, with zeros for those of other sequences."""
        # A view would keep the memory of all tokens.
        last = torch.cat([tail, x], dim=1)[:, x.shape[1]:].clone()
        if seq_idx is None:
            return last
        sequences = F.pad(seq_idx, (self.d_conv - 1, 0))[:, x.shape[1]:]
        return torch.where((sequences == seq_idx[:, -1:]).unsqueeze(2), last, 0)

    def _scan_inputs(self, xBC, z, dt):
        """Arguments of ``ssd`` or ``ssd_step``: for (B, L, channels), or (B, channels)."""
        x, B, C = xBC.split((self.d_ssm, *[self.n_groups * self.d_state] * 2), dim=-1)
        heads, groups = (self.num_heads, self.head_dim), (self.n_groups, self.d_state)
        D = self.D.unflatten(0, heads) if self.D_has_hdim else self.D
        return dict(x=x.unflatten(-1, heads), dt=dt, A=state_matrix(self.A_log),
                    B=B.unflatten(-1, groups), C=C.unflatten(-1, groups), D=D,
                    z=z.unflatten(-1, heads) if self.norm is None else None,
                    dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit)

    def _project_out(self, y, z, mlp):
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        return self.out_proj(y if mlp is None else torch.cat([mlp, y], dim=-1))

    def _one_token(self, x, state):
        mlp, z, xBC, dt = self._project(x.squeeze(1))
        conv = self.conv1d
        xBC, tail = causal_conv_step(state.conv.to(xBC.dtype), xBC, conv.weight.squeeze(1),
                                     conv.bias)
        y, ssm = ssd_step(state.ssm, **self._scan_inputs(xBC, z, dt))
        return self._project_out(y, z, mlp).unsqueeze(1), Mamba2State(tail, ssm)


def _first_state(init_states: Tensor, x: Tensor) -> Tensor:
    """(H, P, N) for each sequence of ``x``."""
    dtype = compute_dtype(init_states.dtype)
    return init_states.to(dtype).expand(x.shape[0], -1, -1, -1)


def own_windows(x: Tensor, seq_idx: Tensor, width: int, tail: Tensor | None = None) -> Tensor:
    """What each token of packed sequences reads in a causal convolution: itself and those before it
    that are of its own sequence, and zeros for the others.

    Args:
        x: (B, L, D).
        seq_idx: (B, L), the number of each token's sequence.
        width: W.
        tail: (B, W - 1, D), what came before, of sequence 0; None for zeros.

    Returns:
        (B * L, D, W), the token itself last.
    """
    seen = F.pad(x, (0, 0, width - 1, 0)) if tail is None else torch.cat([tail, x], dim=1)
    sequences = F.pad(seq_idx, (width - 1, 0)).unfold(1, width, 1)
    is_own = (sequences == seq_idx.unsqueeze(2)).unsqueeze(2)
    return torch.where(is_own, seen.unfold(1, width, 1), 0).flatten(0, 1)
