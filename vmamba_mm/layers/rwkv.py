"""The layers of RWKV 4 (arXiv 2305.13048), 5 and 6 (arXiv 2404.05892) and 7 (arXiv 2503.14456).

Parameters have the official names and shapes, but for ``out_proj``, which is ``output`` there.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.ops import wkv, wkv5, wkv6, wkv6_step, wkv7, wkv7_step, wkv_step
from vmamba_mm.ops.core.backends import compute_dtype


class TimeMixState(NamedTuple):
    """What a time mixing keeps of the tokens that it has seen."""

    last: Tensor  #: (B, C), the last token
    #: fp32, or fp64 in a model of that dtype: (B, H, N, N), channels of keys and of values, or for
    #: RWKV-4 (B, 3, D)
    wkv: Tensor


def shift(x: Tensor, last: Tensor | None = None) -> Tensor:
    """Each token's predecessor, (B, T, C); that of the first is ``last`` (B, C), or 0."""
    if last is None:
        return F.pad(x, (0, 0, 1, -1))
    return torch.cat([last.to(x.dtype).unsqueeze(1), x[:, :-1]], dim=1)


def _mix(x: Tensor, before: Tensor, share: Tensor) -> Tensor:
    """``share`` of a token and the rest of its predecessor, as RWKV 4 and 5 have it."""
    return torch.lerp(before, x, share.to(x.dtype).expand_as(x))


class _TimeMix(nn.Module):
    """What the time mixings share: projections, states, and the published initial values.

    Args:
        embed_dims: C.
        att_dims: D, channels of keys and values; None for C.
        head_dim: N, channels of a head.
        layer, depth: the layer's number, from 0, and how many there are, on which initial values
            depend.
    """

    gated = True

    def __init__(self, embed_dims: int, att_dims: int | None, head_dim: int | None, layer: int,
                 depth: int):
        super().__init__()
        if not 0 <= layer < depth:
            raise ValueError(f'layer={layer!r} must be one of the {depth!r} layers, from 0')
        dims = embed_dims if att_dims is None else att_dims
        if head_dim is not None and (head_dim < 1 or dims % head_dim):
            raise ValueError(f'head_dim={head_dim!r} must divide the {dims} channels')
        self.embed_dims, self.att_dims, self.head_dim = embed_dims, dims, head_dim
        self.num_heads = None if head_dim is None else dims // head_dim
        names = 'receptance', 'key', 'value', *(['gate'] if self.gated else [])
        for name in names:
            self.add_module(name, nn.Linear(embed_dims, dims, bias=False))
        self.out_proj = nn.Linear(dims, embed_dims, bias=False)
        # What initial values depend on: 0 to 1 from the first layer to the last, 1 to nearly 0,
        # and nearly 0 to 1.
        self._start = layer / max(1, depth - 1), 1 - layer / depth, (layer + 1) / depth

    # --- initial values -------------------------------------------------------------------------

    def _init_projections(self):
        """Of the official trainer: zeros at the end, and small keys and gates."""
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        if self.gated:
            nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.zeros_(self.out_proj.weight)
        _exempt_from_decay(self)

    def _ramp(self, power: float, plus: float = 0.0) -> Tensor:
        """(1, 1, C), from 0 to 1 by a power that falls with the layer, and ``plus`` that grows."""
        first, last, _ = self._start
        ramp = torch.arange(self.embed_dims) / self.embed_dims
        return (ramp ** (power * last) + plus * first).view(1, 1, -1)

    def _channels(self) -> tuple[Tensor, Tensor]:
        """The number of each of the D channels, and how far it is, from 0 to 1."""
        channels = torch.arange(self.att_dims)
        return channels, channels / max(1, self.att_dims - 1)

    def _decay_speed(self, low: float = -6.0, span: float = 5.0) -> Tensor:
        return low + span * self._channels()[1] ** (0.7 + 1.3 * self._start[0])

    def _zigzag(self, size: float) -> Tensor:
        return ((self._channels()[0] + 1) % 3 - 1) * size

    def _bonus(self) -> Tensor:
        bonus = self._start[0] * (1 - self._channels()[1]) + self._zigzag(0.1)
        return bonus.view(self.num_heads, self.head_dim)

    def _add_group_norm(self, eps: float):
        self.ln_x = nn.GroupNorm(self.num_heads, self.att_dims, eps=eps)
        nn.init.constant_(self.ln_x.weight, self._start[2] ** 0.7)

    # --- the parts ------------------------------------------------------------------------------

    def init_state(self, batch: int) -> TimeMixState:
        """The state before the first token, of ``batch`` sequences."""
        own = _own_parameter(self)
        shape = batch, self.num_heads, self.head_dim, self.head_dim
        return TimeMixState(own.new_zeros(batch, self.embed_dims),
                            own.new_zeros(shape, dtype=compute_dtype(own.dtype)))

    def step(self, x: Tensor, state: TimeMixState) -> tuple[Tensor, TimeMixState]:
        """One more token: (B, C) and the state of those before to (B, C) and the new state."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def _heads(self, *tensors: Tensor) -> list[Tensor]:
        """(B, T, D) -> (B, T, H, N)."""
        return [t.unflatten(-1, (self.num_heads, self.head_dim)) for t in tensors]

    def _run(self, scan, step, state, tokens: dict[str, Tensor], **parameters):
        """(y (B, T, H, N), the new state of the scan or None)."""
        if state is None:
            return scan(**tokens, **parameters), None
        if tokens['r'].shape[1] == 1:
            y, new = step(state.wkv, **{k: t.squeeze(1) for k, t in tokens.items()}, **parameters)
            return y.unsqueeze(1), new
        return scan(**tokens, **parameters, initial_state=state.wkv, return_final_state=True)

    def _norm_heads(self, y: Tensor) -> Tensor:
        """The norm of each head: (B, T, H, N) -> (B, T, D)."""
        batch, length = y.shape[:2]
        return self.ln_x(y.reshape(-1, self.att_dims)).view(batch, length, self.att_dims)

    def _finish(self, y, g, x, state, new):
        y = self.out_proj((y * g).to(x.dtype))
        # A view would keep the memory of all tokens.
        return y if state is None else (y, TimeMixState(x[:, -1].clone(), new))


class RWKV4TimeMix(_TimeMix):
    """The time mixing of RWKV-4 (section 4.1 of arXiv 2305.13048): one decay for each channel.

    Args:
        embed_dims: C, channels of a token.
        att_dims: D, channels of keys and values; None for C.
        layer, depth: the layer's number, from 0, and how many there are, on which initial values
            depend.

    Shape: (B, T, C) -> (B, T, C), with a state that and the :class:`TimeMixState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    gated = False

    def __init__(self, embed_dims: int, *, att_dims: int | None = None, layer: int = 0,
                 depth: int = 1):
        super().__init__(embed_dims, att_dims, None, layer, depth)
        self.time_decay = nn.Parameter(self._decay_speed(-5.0, 8.0))
        self.time_first = nn.Parameter(math.log(0.3) + self._zigzag(0.5))
        self.time_mix_k = nn.Parameter(self._ramp(1.0))
        self.time_mix_v = nn.Parameter(self._ramp(1.0, 0.3))
        self.time_mix_r = nn.Parameter(self._ramp(0.5))
        self._init_projections()

    def forward(self, x: Tensor, state: TimeMixState | None = None
                ) -> Tensor | tuple[Tensor, TimeMixState]:
        """The result, and the new state if one is given, which is not changed."""
        before = shift(x, None if state is None else state.last)
        k = self.key(_mix(x, before, self.time_mix_k))
        v = self.value(_mix(x, before, self.time_mix_v))
        r = self.receptance(_mix(x, before, self.time_mix_r))
        w, u, new = self.time_decay, self.time_first, None
        if state is None:
            y = wkv(w, u, k, v)
        elif x.shape[1] == 1:
            y, new = wkv_step(state.wkv, w, u, k.squeeze(1), v.squeeze(1))
            y = y.unsqueeze(1)
        else:
            y, new = wkv(w, u, k, v, state=state.wkv, return_state=True)
        return self._finish(y, r.sigmoid(), x, state, new)

    def init_state(self, batch: int) -> TimeMixState:
        own = _own_parameter(self)
        sums = own.new_zeros(batch, 3, self.att_dims, dtype=compute_dtype(own.dtype))
        sums[:, 2] = -torch.inf
        return TimeMixState(own.new_zeros(batch, self.embed_dims), sums)


class RWKV5TimeMix(_TimeMix):
    """The time mixing of RWKV-5.2, Eagle (section 4 of arXiv 2404.05892): a matrix for each head.

    Args:
        embed_dims, att_dims, layer, depth: as of :class:`RWKV4TimeMix`.
        head_dim: N, channels of a head, of keys and of values.
        head_divisor: by which the result is divided before its norm.

    Shape: (B, T, C) -> (B, T, C), with a state that and the :class:`TimeMixState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, *, head_dim: int = 64, att_dims: int | None = None,
                 head_divisor: float = 8, layer: int = 0, depth: int = 1):
        super().__init__(embed_dims, att_dims, head_dim, layer, depth)
        self.head_divisor = head_divisor
        self.time_mix_k = nn.Parameter(self._ramp(1.0))
        self.time_mix_v = nn.Parameter(self._ramp(1.0, 0.3))
        self.time_mix_r = nn.Parameter(self._ramp(0.5))
        self.time_mix_g = nn.Parameter(self._ramp(0.5))
        self.time_decay = nn.Parameter(self._decay_speed().view(self.num_heads, head_dim))
        self.time_faaaa = nn.Parameter(self._bonus())
        self._add_group_norm(1e-5)
        self._init_projections()

    def forward(self, x: Tensor, state: TimeMixState | None = None
                ) -> Tensor | tuple[Tensor, TimeMixState]:
        """The result, and the new state if one is given, which is not changed."""
        before = shift(x, None if state is None else state.last)
        r, k, v = self._heads(self.receptance(_mix(x, before, self.time_mix_r)),
                              self.key(_mix(x, before, self.time_mix_k)),
                              self.value(_mix(x, before, self.time_mix_v)))
        g = F.silu(self.gate(_mix(x, before, self.time_mix_g)))
        y, new = self._run(wkv5, _wkv5_step, state, dict(r=r, k=k, v=v), w=self.time_decay,
                           u=self.time_faaaa)
        return self._finish(self._norm_heads(y / self.head_divisor), g, x, state, new)


def _wkv5_step(state, r, k, v, w, u):
    return wkv6_step(state, r, k, v, w.expand(r.shape), u)


class RWKV6TimeMix(_TimeMix):
    """The time mixing of RWKV-6, Finch (section 4 of arXiv 2404.05892): as 5, but the shift and the
    decay depend on the token, by low-rank projections.

    Args:
        embed_dims, att_dims, head_dim, layer, depth: as of :class:`RWKV5TimeMix`.
        head_divisor: the square root of what the epsilon of the norm is multiplied with.
        mix_rank, decay_rank: of the projections for the shift and for the decay.

    Shape: (B, T, C) -> (B, T, C), with a state that and the :class:`TimeMixState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, *, head_dim: int = 64, att_dims: int | None = None,
                 head_divisor: float = 8, mix_rank: int = 32, decay_rank: int = 64, layer: int = 0,
                 depth: int = 1):
        super().__init__(embed_dims, att_dims, head_dim, layer, depth)
        for name, power, plus in (('x', 1.0, 0), ('w', 1.0, 0), ('k', 1.0, 0), ('v', 1.0, 0.3),
                                  ('r', 0.5, 0), ('g', 0.5, 0)):
            self.register_parameter(f'time_maa_{name}', nn.Parameter(1 - self._ramp(power, plus)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(embed_dims, 5 * mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, mix_rank, embed_dims).uniform_(-.01, .01))
        self.time_decay = nn.Parameter(self._decay_speed().view(1, 1, -1))
        self.time_decay_w1 = nn.Parameter(torch.zeros(embed_dims, decay_rank))
        self.time_decay_w2 = nn.Parameter(
            torch.empty(decay_rank, self.att_dims).uniform_(-.01, .01))
        self.time_faaaa = nn.Parameter(self._bonus())
        self._add_group_norm(1e-5 * head_divisor ** 2)
        self._init_projections()

    def forward(self, x: Tensor, state: TimeMixState | None = None
                ) -> Tensor | tuple[Tensor, TimeMixState]:
        """The result, and the new state if one is given, which is not changed."""
        change = shift(x, None if state is None else state.last) - x
        shares = torch.addcmul(x, change, self.time_maa_x.to(x.dtype)) @ self.time_maa_w1
        shares = shares.tanh().unflatten(-1, (5, 1, -1)) @ self.time_maa_w2  # (B, T, 5, 1, C)
        names = 'w', 'k', 'v', 'r', 'g'
        xs = {name: x + change * (getattr(self, f'time_maa_{name}') + share.squeeze(-2)).to(x.dtype)
              for name, share in zip(names, shares.unbind(2), strict=True)}
        # In fp32 where the model is: a decay near 1 is made of small numbers.
        w = self.time_decay + (xs['w'] @ self.time_decay_w1).tanh() @ self.time_decay_w2
        r, k, v, w = self._heads(self.receptance(xs['r']), self.key(xs['k']), self.value(xs['v']),
                                 w)
        g = F.silu(self.gate(xs['g']))
        y, new = self._run(wkv6, wkv6_step, state, dict(r=r, k=k, v=v, w=w), u=self.time_faaaa)
        return self._finish(self._norm_heads(y), g, x, state, new)


class RWKV7TimeMix(_TimeMix):
    """The time mixing of RWKV-7, Goose (section 4 of arXiv 2503.14456): a generalised delta rule.

    Values of all layers but the first are mixed with those of the first.

    Args:
        embed_dims, head_dim, layer, depth: as of :class:`RWKV5TimeMix`.
        decay_rank, rate_rank, value_rank, gate_rank: of the low-rank projections for the decay, the
            rate at which a key is replaced, the share of the first layer's values, and the gate.

    Shape: (B, T, C) -> (B, T, C) and the values (B, T, C) of the first layer, with a state those
    and the :class:`TimeMixState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    gated = False

    def __init__(self, embed_dims: int, *, head_dim: int = 64, decay_rank: int = 64,
                 rate_rank: int = 64, value_rank: int = 32, gate_rank: int = 128, layer: int = 0,
                 depth: int = 1):
        super().__init__(embed_dims, None, head_dim, layer, depth)
        for name, power in (('r', 0.2), ('w', 0.9), ('k', 0.7), ('v', 0.7), ('a', 0.9), ('g', 0.2)):
            self.register_parameter(f'x_{name}', nn.Parameter(1 - self._ramp(power)))
        channels, share = self._channels()
        zigzag = (channels % head_dim) / max(1, head_dim - 1) * 2 - 1
        zigzag, line = zigzag * zigzag.abs(), share - 0.5
        speed = -6 + 6 * share ** (1 + self._start[0] ** 0.3)
        starts = dict(w=speed + 0.5 + 2.5 * zigzag, a=-0.19 + 0.3 * zigzag + 0.4 * line,
                      v=0.73 - 0.4 * line)
        ranks = dict(w=decay_rank, a=rate_rank, v=value_rank, g=gate_rank)
        self.is_first = layer == 0
        for name, rank in ranks.items():
            if name == 'v' and self.is_first:
                continue
            if name in starts:
                self.register_parameter(f'{name}0', nn.Parameter(starts[name].view(1, 1, -1)))
            self.register_parameter(f'{name}1', nn.Parameter(torch.zeros(embed_dims, rank)))
            self.register_parameter(f'{name}2', nn.Parameter(_orthogonal(rank, embed_dims, 0.1)))
        self.k_k = nn.Parameter((0.71 - 0.1 * line).view(1, 1, -1))
        self.k_a = nn.Parameter(torch.full((1, 1, embed_dims), 1.02))
        self.r_k = nn.Parameter(torch.full((self.num_heads, head_dim), -0.04))
        self._add_group_norm(64e-5)
        self._init_projections()

    def forward(self, x: Tensor, state: TimeMixState | None = None,
                first_value: Tensor | None = None
                ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, TimeMixState]:
        """The result, the values of the first layer, and the new state if one is given, which is
        not changed.

        Args:
            x: (B, T, C).
            state: of the tokens before; None if there are none and nothing comes after.
            first_value: (B, T, C), of the first layer, which is given to all others.
        """
        if (first_value is None) != self.is_first:
            raise ValueError('RWKV7TimeMix expects the values of the first layer in all others, '
                             'and none in the first')
        change = shift(x, None if state is None else state.last) - x
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, change, getattr(self, f'x_{n}').to(x.dtype))
                                  for n in 'rwkvag')
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # Decays of at least exp(-exp(-0.5)), in fp32 where the model is.
        w = -F.softplus(-(self.w0 + (xw @ self.w1).tanh() @ self.w2)) - 0.5
        if self.is_first:
            first_value = v
        else:
            share = (self.v0 + xv @ self.v1 @ self.v2).sigmoid()
            v = torch.lerp(v, first_value.to(v.dtype), share.to(v.dtype))
        rate = (self.a0 + xa @ self.a1 @ self.a2).sigmoid().to(k.dtype)
        g = (xg @ self.g1).sigmoid() @ self.g2
        removed, = self._heads(k * self.k_k.to(k.dtype))
        removed = F.normalize(removed.to(compute_dtype(k.dtype)), dim=-1).to(k.dtype)
        k = k * (1 + (rate - 1) * self.k_a.to(k.dtype))
        r, w, k, v, rate = self._heads(r, w, k, v, rate)
        y, new = self._run(wkv7, wkv7_step, state, dict(
            r=r, w=w, k=k, v=v, a=-removed, b=removed * rate))
        bonus = (r * k * self.r_k.to(k.dtype)).sum(-1, keepdim=True) * v
        found = self._finish(self._norm_heads(y) + bonus.flatten(2), g, x, state, new)
        return (found, first_value) if state is None else (found[0], first_value, found[1])

    def step(self, x: Tensor, state: TimeMixState, first_value: Tensor | None = None
             ) -> tuple[Tensor, Tensor, TimeMixState]:
        """One more token: as :meth:`forward`, of (B, C)."""
        first_value = None if first_value is None else first_value.unsqueeze(1)
        y, first_value, state = self(x.unsqueeze(1), state, first_value)
        return y.squeeze(1), first_value.squeeze(1), state


class RWKVChannelMix(nn.Module):
    """The channel mixing of RWKV: an MLP with squared ReLU of a token and the one before.

    Args:
        embed_dims: C, channels of a token.
        hidden_dims: channels inside.
        version: 4, 5, 6 or 7, which differ in the names of parameters; 7 has no gate.
        layer, depth: the layer's number, from 0, and how many there are, on which initial values
            depend.

    Shape: (B, T, C) -> (B, T, C), with the last token before them, (B, C), that and the new one.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, version: int = 7, *, layer: int = 0,
                 depth: int = 1):
        super().__init__()
        if version not in (4, 5, 6, 7):
            raise ValueError(f'version={version!r} does not exist; choose 4, 5, 6 or 7')
        if not 0 <= layer < depth:
            raise ValueError(f'layer={layer!r} must be one of the {depth!r} layers, from 0')
        power = 1 - layer / depth
        ramp = (torch.arange(embed_dims) / embed_dims) ** (power ** 4 if version == 7 else power)
        ramp = ramp.view(1, 1, -1)
        self.embed_dims, self.version = embed_dims, version
        self.key = nn.Linear(embed_dims, hidden_dims, bias=False)
        self.value = nn.Linear(hidden_dims, embed_dims, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)
        if version == 7:
            self.x_k = nn.Parameter(1 - ramp)
            _exempt_from_decay(self)
            return
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        nn.init.zeros_(self.receptance.weight)
        for name in 'kr':
            if version == 6:
                self.register_parameter(f'time_maa_{name}', nn.Parameter(1 - ramp))
            else:
                self.register_parameter(f'time_mix_{name}', nn.Parameter(ramp.clone()))
        _exempt_from_decay(self)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The result, and the new last token if the one before ``x`` is given."""
        before = shift(x, last)
        hidden = self.key(self._mixed('k', x, before)).relu().square()
        y = self.value(hidden)
        if self.version != 7:
            y = self.receptance(self._mixed('r', x, before)).sigmoid() * y
        return y if last is None else (y, x[:, -1].clone())

    def init_state(self, batch: int) -> Tensor:
        """The token before the first one, of ``batch`` sequences: zeros (B, C)."""
        return _own_parameter(self).new_zeros(batch, self.embed_dims)

    def _mixed(self, name, x, before):
        if self.version < 6:
            return _mix(x, before, getattr(self, f'time_mix_{name}'))
        share = getattr(self, f'time_maa_{name}' if self.version == 6 else f'x_{name}')
        return torch.addcmul(x, before - x, share.to(x.dtype))


def _own_parameter(module: nn.Module) -> Tensor:
    """One that stays the module's own where adapters or quantisation replace linear layers."""
    return next(module.parameters(recurse=False))


def _exempt_from_decay(module: nn.Module) -> None:
    """As published, weight decay is for the weights of linear layers alone."""
    for parameter in module.parameters(recurse=False):
        parameter._no_weight_decay = True


def _orthogonal(rows: int, columns: int, scale: float) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns),
                               gain=scale * max(1, rows / columns) ** 0.5)
