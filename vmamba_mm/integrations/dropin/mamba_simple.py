"""The block Mamba, with the arguments of the forks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.integrations.dropin.conv import causal_conv1d_update
from vmamba_mm.integrations.dropin.inner import cast_for_autocast, mix
from vmamba_mm.integrations.dropin.scan import selective_scan_fn
from vmamba_mm.integrations.dropin.state_update import selective_state_update
from vmamba_mm.layers.ssm_init import init_A_logs, init_dt_bias, state_matrix
from vmamba_mm.ops import causal_conv, mamba_inner
from vmamba_mm.ops.core.backends import compute_dtype

#: bimamba_type -> the suffixes of the parameters that a direction has of its own.
DIRECTIONS = {'none': ('',), 'v1': ('',), 'v2': ('', '_b'), 'v3': ('', '_b', '_s')}


class Mamba(nn.Module):
    """The Mamba block (S6) of mamba_ssm and of its bidirectional forks.

    Parameters, their order and their initial values are those of the official code, so that its
    files, its optimizer states and its seeds fit. ``in_proj`` and ``out_proj`` are called as
    modules, which mamba_ssm does not do: adapters and hooks on them work.

    Args:
        d_model: C, channels of a token.
        d_state: N. d_conv: width of the convolution. expand: D / C.
        dt_rank: R, 'auto' for ceil(C / 16).
        dt_min, dt_max, dt_init_floor: dt starts log-uniform between the first two, at least at the
            third. dt_init, dt_scale: its weight starts 'random' within dt_scale R^-0.5, or
            'constant' at it.
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        use_fast_path: has no effect; every path has the same results. Vim's other path leaves out
            the backward direction.
        layer_idx: the key of this layer's state in ``inference_params``.
        bimamba_type: 'none'; Vim's 'v1' (both directions share all but A) or 'v2' (each has its
            own convolution, projections, A and D); SegMamba's 'v3' (the same and a third direction
            that takes one token of each of ``nslices`` slices in turn).
        if_divide_out, if_devide_out: the mean of both directions of 'v2' in place of their sum;
            the second is another fork's spelling.
        init_layer_scale: initial value of ``gamma``, a factor by channel of the result; None for
            no such parameter.
        bimamba: VideoMamba's name: True for 'v2', False for 'none'.
        nslices: of 'v3'; a sequence has to be a multiple of it.

    Raises:
        ValueError: on a value that does not exist.
    """

    #: Outputs of in_proj and inputs of out_proj, by D.
    widths = 2, 1

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2,
                 dt_rank: int | str = 'auto', dt_min: float = 0.001, dt_max: float = 0.1,
                 dt_init: str = 'random', dt_scale: float = 1.0, dt_init_floor: float = 1e-4,
                 conv_bias: bool = True, bias: bool = False, use_fast_path: bool = True,
                 layer_idx: int | None = None, device=None, dtype: torch.dtype | None = None,
                 bimamba_type: str | None = 'none', if_divide_out: bool = False,
                 init_layer_scale: float | None = None, *, if_devide_out: bool = False,
                 bimamba: bool | None = None, nslices: int = 5):
        super().__init__()
        if bimamba is not None:
            bimamba_type = 'v2' if bimamba else 'none'
        bimamba_type = bimamba_type or 'none'
        if bimamba_type not in DIRECTIONS:
            raise ValueError(f'bimamba_type={bimamba_type!r} does not exist in vmamba_mm.dropin; '
                             f'choose one of {tuple(DIRECTIONS)}')
        if dt_init not in ('random', 'constant'):
            raise ValueError(f"dt_init={dt_init!r} does not exist; choose 'random' or 'constant'")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == 'auto' else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.nslices = bimamba_type, nslices
        self.if_divide_out = if_divide_out or if_devide_out
        self.init_layer_scale = init_layer_scale
        options = dict(device=device, dtype=dtype)

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))
        self.in_proj = nn.Linear(d_model, self.widths[0] * self.d_inner, bias=bias, **options)
        self._add_direction('', conv_bias, options)
        bound = self.dt_rank ** -0.5 * dt_scale
        with torch.no_grad():
            if dt_init == 'constant':
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(init_dt_bias(1, self.d_inner, dt_min, dt_max,
                                                 dt_init_floor)[0])
        self.dt_proj.bias._no_reinit = True  # initialisers of official models heed it
        self._add_states('', device)
        if bimamba_type == 'v1':
            self.A_b_log = self._states(device)
        for suffix in DIRECTIONS[bimamba_type][1:]:
            self._add_states(suffix, device)
            self._add_direction(suffix, conv_bias, options)
        self.activation = 'silu'
        self.act = nn.SiLU()
        self._add_before_out_proj(options)
        self.out_proj = nn.Linear(self.widths[1] * self.d_inner, d_model, bias=bias, **options)

    @property
    def if_devide_out(self) -> bool:
        """``if_divide_out``, as another fork spells it."""
        return self.if_divide_out

    @if_devide_out.setter
    def if_devide_out(self, value: bool) -> None:
        self.if_divide_out = value

    def _add_before_out_proj(self, options: dict) -> None:
        """For a fork that has a module there."""

    def _add_direction(self, suffix: str, conv_bias: bool, options: dict) -> None:
        inner = self.d_inner
        self.add_module(f'conv1d{suffix}', nn.Conv1d(
            inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1, bias=conv_bias,
            **options))
        self.add_module(f'x_proj{suffix}', nn.Linear(
            inner, self.dt_rank + 2 * self.d_state, bias=False, **options))
        self.add_module(f'dt_proj{suffix}', nn.Linear(self.dt_rank, inner, **options))

    def _add_states(self, suffix: str, device) -> None:
        self.register_parameter(f'A{suffix}_log', self._states(device))
        D = nn.Parameter(torch.ones(self.d_inner, device=device))  # in fp32 whatever the dtype
        D._no_weight_decay = True
        self.register_parameter(f'D{suffix}', D)

    def _states(self, device) -> nn.Parameter:
        A_log = nn.Parameter(init_A_logs(1, self.d_inner, self.d_state).to(device))
        A_log._no_weight_decay = True
        return A_log

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """(B, L, C) to (B, L, C).

        Args:
            inference_params: with ``seqlen_offset``, the tokens seen so far, and
                ``key_value_memory_dict``, where this layer keeps its state; None outside of
                decoding.

        Raises:
            ValueError: if a bidirectional block is to decode, or 'v3' cannot slice the sequence.
        """
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
            return self._prefill(hidden_states, *states)
        y = self._run(self.in_proj(hidden_states))
        return self._scaled(self.out_proj(y))

    def _run(self, xz: Tensor) -> Tensor:
        """What is between the two outer projections: (B, L, 2D) to (B, L, D)."""
        if self.bimamba_type == 'none':
            return self._mix(xz, ('',))
        if self.bimamba_type == 'v1':
            return mix(xz.transpose(1, 2), self.conv1d.weight, self.conv1d.bias,
                       self.x_proj.weight, self.dt_proj.weight, self._A(''), None, None,
                       _wide(self.D), _wide(self.dt_proj.bias), None, None, True, self._A('_b'))
        is_mean = self.if_divide_out and self.bimamba_type == 'v2'
        y = self._mix(xz, ('', '_b'), 0.5 if is_mean else 1.0)
        if self.bimamba_type == 'v3':
            y = y + self._from_slices(self._mix(self._to_slices(xz), ('_s',)))
        return y

    def _mix(self, xz: Tensor, directions: tuple[str, ...], scale: float = 1.0,
             reverse: bool = False) -> Tensor:
        """(B, L, 2D) to (B, L, D): the sum over one direction or two, by ``scale``."""
        def stack(tensors):
            tensors = list(tensors)
            return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)

        convs = [getattr(self, f'conv1d{suffix}') for suffix in directions]
        dts = [getattr(self, f'dt_proj{suffix}') for suffix in directions]
        xz, x_proj, dt_proj = cast_for_autocast(
            xz, stack(getattr(self, f'x_proj{suffix}').weight for suffix in directions),
            stack(dt.weight for dt in dts))
        return mamba_inner(
            xz, stack(conv.weight[:, 0] for conv in convs),
            None if convs[0].bias is None else stack(conv.bias for conv in convs),
            x_proj, dt_proj, stack(_wide(dt.bias) for dt in dts), stack(map(self._A, directions)),
            stack(_wide(getattr(self, f'D{suffix}')) for suffix in directions), scale=scale,
            reverse=reverse)

    def _A(self, suffix: str) -> Tensor:
        return state_matrix(getattr(self, f'A{suffix}_log'))

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def _to_slices(self, x: Tensor) -> Tensor:
        """(B, L, ...) in the order of 'v3': the first token of each slice, then the second..."""
        if x.shape[1] % self.nslices:
            raise ValueError(f"bimamba_type='v3' expects a sequence that is a multiple of nslices="
                             f'{self.nslices}, got {x.shape[1]} tokens')
        return x.unflatten(1, (self.nslices, -1)).transpose(1, 2).flatten(1, 2)

    def _from_slices(self, x: Tensor) -> Tensor:
        """Undo :meth:`_to_slices`."""
        return x.unflatten(1, (-1, self.nslices)).transpose(1, 2).flatten(1, 2)

    # --- decoding ---------------------------------------------------------------------------

    def _prefill(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """The first tokens; the states are written in place."""
        x, z = self.in_proj(hidden_states).chunk(2, -1)
        conv_state.copy_(F.pad(x.transpose(1, 2), (self.d_conv - x.shape[1], 0)))
        x = causal_conv(x, self.conv1d.weight[:, 0], self.conv1d.bias)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt, weight = cast_for_autocast(dt, self.dt_proj.weight)
        x, dt, B, C, z = (t.transpose(1, 2) for t in (x, F.linear(dt, weight), B, C, z))
        y, last = selective_scan_fn(x, dt, self._A(''), B, C, _wide(self.D), z,
                                    _wide(self.dt_proj.bias), True, return_last_state=True)
        ssm_state.copy_(last)
        return self._scaled(self.out_proj(y.transpose(1, 2)))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, C) to (B, 1, C); the states are changed in place and returned."""
        if hidden_states.shape[1] != 1:
            raise ValueError('Mamba decodes one token at a time, got a sequence of '
                             f'{hidden_states.shape[1]}')
        self._refuse_directions()
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, 'silu')
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt, weight = cast_for_autocast(dt, self.dt_proj.weight)
        y = selective_state_update(ssm_state, x, F.linear(dt, weight), self._A(''), B, C, self.D,
                                   z, self.dt_proj.bias, True)
        return self._scaled(self.out_proj(y))[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int,
                                 dtype: torch.dtype | None = None, **kwargs
                                 ) -> tuple[Tensor, Tensor]:
        """States for ``batch_size`` sequences: the last inputs of the convolution (B, D, W) and
        the scan's (B, D, N). ``max_seqlen`` has no effect: they do not grow."""
        self._refuse_directions()
        weight, dt_weight = self.conv1d.weight, self.dt_proj.weight
        return (weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
                dt_weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype))

    def _get_states_from_cache(self, inference_params, batch_size: int,
                               initialize_states: bool = False) -> tuple[Tensor, Tensor]:
        states = states_from_cache(self, inference_params, batch_size, initialize_states)
        self._refuse_directions()
        return states

    def _refuse_directions(self) -> None:
        if self.bimamba_type != 'none':
            raise ValueError(f'a Mamba with bimamba_type={self.bimamba_type!r} reads a sequence in '
                             'both directions and cannot decode token by token')


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 in a model of that dtype."""
    return x.to(compute_dtype(x.dtype))


def states_from_cache(block: nn.Module, inference_params, batch_size: int, initialize_states: bool
                      ) -> tuple[Tensor, Tensor]:
    """The states of a block that decodes, from the cache of mamba_ssm: new ones the first time."""
    if block.layer_idx is None:
        raise ValueError(f'a {type(block).__name__} that decodes needs a layer_idx, the key of its '
                         'state')
    memory = inference_params.key_value_memory_dict
    if block.layer_idx not in memory:
        memory[block.layer_idx] = block.allocate_inference_cache(batch_size, 0)
    elif initialize_states:
        for state in memory[block.layer_idx]:
            state.zero_()
    return memory[block.layer_idx]
