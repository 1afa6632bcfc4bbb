"""Mixers of S6 in one dimension.

:class:`MambaMixer` is that of Mamba (arXiv 2312.00752, section 3.4); the others read the sequence
in both directions, as Vim (arXiv 2401.09417), VideoMamba (arXiv 2403.06977) and Video Mamba Suite
(arXiv 2403.09626) do, in a random order too, as RSMamba (arXiv 2403.19654), or across the slices of
a volume, as SegMamba (arXiv 2401.13560). Parameters have the names of the official code, where
``_b`` marks those of the backward direction alone, and ``_s`` those of the order across slices.

Where nobody watches the submodules, all between ``in_proj`` and ``out_proj`` runs as the op
``mamba_inner``; else it runs step by step, and every submodule is called.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.norm import RMSNorm
from vmamba_mm.layers.plain import are_plain, is_plain
from vmamba_mm.layers.ssm_init import init_A_logs, init_dt_bias, init_dt_proj, state_matrix
from vmamba_mm.ops import (
    across_slices,
    along_slices,
    causal_conv,
    causal_conv_step,
    mamba_inner,
    selective_scan,
    selective_scan_step,
)
from vmamba_mm.ops.core.backends import compute_dtype

# What torch.fx records as it is, since it looks at shapes and dtypes.
torch.fx.wrap('across_slices')
torch.fx.wrap('along_slices')
torch.fx.wrap('causal_conv')
torch.fx.wrap('mamba_inner')
torch.fx.wrap('selective_scan')
torch.fx.wrap('state_matrix')


class MambaState(NamedTuple):
    """What a causal mixer keeps of the tokens that it has seen."""

    conv: Tensor  #: (B, d_conv - 1, D), the last inputs of the convolution, oldest first
    ssm: Tensor  #: (B, D, N), the state of the scan: fp32, or fp64 in a model of that dtype


class _Mixer(nn.Module):
    """The parameters of a mixer, and its directions as one op or step by step.

    Args:
        embed_dims: C, channels of a token.
        d_state: N, size of the state of one channel.
        d_conv: W, width of the causal convolution.
        expand: D / C.
        dt_rank: R; 'auto' for ceil(C / 16).
        conv_bias: whether the convolutions have a bias.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        layer_scale: initial value of ``gamma``, a factor for each channel of the result; None for
            no such parameter.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    #: Suffixes in the names of each direction's own parameters.
    directions: tuple[str, ...] = ('',)
    #: Outputs of ``in_proj`` and inputs of ``out_proj``, by D.
    widths = 2, 1

    def __init__(self, embed_dims: int, *, d_state: int = 16, d_conv: int = 4, expand: float = 2,
                 dt_rank: int | str = 'auto', conv_bias: bool = True, bias: bool = False,
                 layer_scale: float | None = None):
        super().__init__()
        # A quotient of integers may lie a little below the one whose product is meant.
        inner = int(expand * embed_dims + 1e-9)
        if inner < 1:
            raise ValueError(f'expand must be at least 1/{embed_dims} for {embed_dims} channels, '
                             f'got {expand!r}')
        if d_state < 1 or d_conv < 2:
            raise ValueError(f'd_state must be at least 1 and d_conv at least 2, got {d_state!r} '
                             f'and {d_conv!r}')
        if dt_rank != 'auto' and not (isinstance(dt_rank, int) and dt_rank > 0):
            raise ValueError(f"dt_rank must be 'auto' or an int of at least 1, got {dt_rank!r}")
        self.inner_dims, self.d_state, self.d_conv = inner, d_state, d_conv
        self.dt_rank = -(-embed_dims // 16) if dt_rank == 'auto' else dt_rank
        self.in_proj = nn.Linear(embed_dims, self.widths[0] * inner, bias=bias)
        for suffix in self.directions:
            self._add_direction(suffix, conv_bias)
        self.out_proj = nn.Linear(self.widths[1] * inner, embed_dims, bias=bias)
        self.register_parameter('gamma', None if layer_scale is None else nn.Parameter(
            torch.full((embed_dims,), float(layer_scale))))

    def _add_direction(self, suffix, conv_bias):
        """The parameters of one direction, with Mamba's initial values."""
        inner, rank = self.inner_dims, self.dt_rank
        self.add_module(f'conv1d{suffix}', nn.Conv1d(
            inner, inner, self.d_conv, padding=self.d_conv - 1, groups=inner, bias=conv_bias))
        self.add_module(f'x_proj{suffix}', nn.Linear(inner, rank + 2 * self.d_state, bias=False))
        dt_proj = nn.Linear(rank, inner)
        dt_proj.weight = nn.Parameter(init_dt_proj(1, inner, rank)[0])
        dt_proj.bias = nn.Parameter(init_dt_bias(1, inner)[0])
        self.add_module(f'dt_proj{suffix}', dt_proj)
        self.register_parameter(f'A{suffix}_log', nn.Parameter(init_A_logs(1, inner, self.d_state)))
        self.register_parameter(f'D{suffix}', nn.Parameter(torch.ones(inner)))

    def forward(self, x: Tensor) -> Tensor:
        return self._project_out(self._mix(self.in_proj(x)))

    def _mix(self, xz: Tensor) -> Tensor:
        """What is between the projections: (B, L, widths[0] * D) to (B, L, widths[1] * D)."""
        raise NotImplementedError

    def _project_out(self, y: Tensor) -> Tensor:
        y = self.out_proj(y)
        return y if self.gamma is None else y * self.gamma.to(y.dtype)

    # --- all directions as one op -----------------------------------------------------------

    def _is_one_op(self) -> bool:
        """Whether nobody watches or has replaced the directions' submodules."""
        return all(
            is_causal_conv(conv) and are_plain((x_proj, dt_proj), (nn.Linear, nn.Linear))
            and x_proj.bias is None and dt_proj.bias is not None
            for conv, x_proj, dt_proj in map(self._modules_of, self.directions))

    def _inner(self, xz: Tensor, reverse: bool = False, scale: float = 1.0,
               directions: Sequence[str] | None = None) -> Tensor:
        """(B, L, 2D), x before z, to (B, L, D), by some of the directions or all."""
        directions = self.directions if directions is None else directions
        convs, x_projs, dt_projs = zip(*map(self._modules_of, directions), strict=True)
        A_logs = [getattr(self, f'A{suffix}_log') for suffix in directions]
        return mamba_inner(
            xz, _stack([conv.weight for conv in convs]).squeeze(2),
            None if convs[0].bias is None else _stack([conv.bias for conv in convs]),
            _stack([x_proj.weight for x_proj in x_projs]),
            _stack([dt_proj.weight for dt_proj in dt_projs]),
            _stack([dt_proj.bias for dt_proj in dt_projs]), state_matrix(_stack(A_logs)),
            _stack([getattr(self, f'D{suffix}') for suffix in directions]),
            reverse=reverse, scale=scale)

    def _modules_of(self, suffix):
        return (getattr(self, f'conv1d{suffix}'), getattr(self, f'x_proj{suffix}'),
                getattr(self, f'dt_proj{suffix}'))

    # --- a direction step by step -----------------------------------------------------------

    def _direction(self, xz: Tensor, suffix: str = '', reverse: bool = False) -> Tensor:
        """(B, L, 2D), x before z, to (B, L, D)."""
        x, z = xz.chunk(2, dim=-1)
        conv, _, _ = self._modules_of(suffix)
        u = self._convolve(conv, x, reverse)
        inputs = self._scan_inputs(u, z, suffix)
        return self._scan(inputs, getattr(self, f'A{suffix}_log'), reverse)

    def _convolve(self, conv: nn.Module, x: Tensor, reverse: bool = False) -> Tensor:
        """The causal convolution and SiLU: (B, L, D) to (B, L, D)."""
        if not reverse or is_causal_conv(conv):
            return convolve(conv, x, reverse=reverse)
        return convolve(conv, x.flip(1)).flip(1)

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before its projection, B and C, of the result of ``x_proj``."""
        return projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)

    def _scan_inputs(self, u: Tensor, z: Tensor, suffix: str = '') -> dict[str, Tensor | None]:
        """Arguments of the scan, but A, for tokens: (B, L, D), or (B, D) of one token."""
        _, x_proj, dt_proj = self._modules_of(suffix)
        dt, B, C = self._split(x_proj(u))
        if is_plain(dt_proj, nn.Linear):  # its bias is added in fp32
            delta, bias = F.linear(dt, dt_proj.weight), dt_proj.bias
        else:
            delta, bias = dt_proj(dt), None
        return dict(u=u, delta=delta, B=B, C=C, z=z, D=getattr(self, f'D{suffix}'), delta_bias=bias)

    def _scan(self, inputs: dict[str, Tensor | None], A_log: Tensor, reverse: bool = False,
              **states) -> Tensor:
        """The scan and the gate, (B, L, D); with the final state if ``states`` asks for it."""
        tokens = {name: inputs[name].transpose(1, 2) for name in ('u', 'delta', 'z')}
        B, C = (inputs[name].transpose(1, 2).unsqueeze(1) for name in 'BC')
        result = selective_scan(A=state_matrix(A_log), B=B, C=C, D=inputs['D'], **tokens,
                                delta_bias=inputs['delta_bias'], delta_softplus=True,
                                reverse=reverse, **states)
        if states:
            return result[0].transpose(1, 2), result[1]
        return result.transpose(1, 2)


class MambaMixer(_Mixer):
    """The mixer of Mamba, which sees what came before (arXiv 2312.00752, section 3.4).

    ``in_proj`` gives x and z; x goes through a causal depthwise convolution with SiLU and the S6
    scan, whose result is multiplied by SiLU(z) before ``out_proj``.

    Args:
        embed_dims: C, channels of a token.
        d_state: N, size of the state of one channel.
        d_conv: W, width of the causal convolution.
        expand: D / C.
        dt_rank: R; 'auto' for ceil(C / 16).
        conv_bias: whether the convolution has a bias.
        bias: whether ``in_proj`` and ``out_proj`` have one.
        layer_scale: initial value of ``gamma``, a factor for each channel of the result; None for
            no such parameter.
        inner_norms: RMSNorms of dt before its projection, of B and of C, named ``dt_norm``,
            ``b_norm`` and ``c_norm`` (Jamba, arXiv 2403.19887, section 3.1). What lies between the
            projections then runs step by step.
        norm_eps: of these norms.

    Shape: (B, L, C) -> (B, L, C), with a state that and the :class:`MambaState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, *, inner_norms: bool = False, norm_eps: float = 1e-6,
                 **kwargs):
        super().__init__(embed_dims, **kwargs)
        sizes = dict(dt=self.dt_rank, b=self.d_state, c=self.d_state)
        for name, size in sizes.items():
            self.add_module(f'{name}_norm', RMSNorm(size, norm_eps) if inner_norms else None)

    def _is_one_op(self) -> bool:
        return self.dt_norm is None and super()._is_one_op()

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dt, B, C = super()._split(projected)
        if self.dt_norm is None:
            return dt, B, C
        norms = self.dt_norm, self.b_norm, self.c_norm
        return tuple(norm(t.contiguous()).to(t.dtype)
                     for norm, t in zip(norms, (dt, B, C), strict=True))

    def forward(self, x: Tensor, state: MambaState | None = None
                ) -> Tensor | tuple[Tensor, MambaState]:
        """The mixer's result, and the new state if one is given, which is not changed.

        Args:
            x: (B, L, C).
            state: what :meth:`init_state`, :meth:`step` or an earlier call returned, for the
                tokens before ``x``; None if there are none and nothing comes after.
        """
        if state is None:
            return super().forward(x)
        if x.shape[1] == 1 and is_causal_conv(self.conv1d):
            return self._one_token(x, state)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        # Before the convolution stand the last tokens, in place of zeros.
        seen = torch.cat([state.conv.to(x.dtype), x], dim=1)
        u = self._convolve(self.conv1d, seen)[:, self.d_conv - 1:]
        y, ssm = self._scan(self._scan_inputs(u, z), self.A_log, initial_state=state.ssm,
                            return_final_state=True)
        # A view would keep the memory of all tokens.
        return self._project_out(y), MambaState(seen[:, x.shape[1]:].clone(), ssm)

    def _one_token(self, x, state):
        x, z = self.in_proj(x.squeeze(1)).chunk(2, dim=-1)
        conv = self.conv1d
        u, tail = causal_conv_step(state.conv.to(x.dtype), x, conv.weight.squeeze(1), conv.bias)
        inputs = self._scan_inputs(u, z)
        B, C = inputs.pop('B').unsqueeze(1), inputs.pop('C').unsqueeze(1)
        y, ssm = selective_scan_step(state.ssm, A=state_matrix(self.A_log), B=B, C=C, **inputs,
                                     delta_softplus=True)
        return self._project_out(y).unsqueeze(1), MambaState(tail, ssm)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One more token.

        Args:
            x: (B, C).
            state: of the tokens before.

        Returns:
            (B, C) and the new state; the old one is not changed.
        """
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def init_state(self, batch: int) -> MambaState:
        """The state before the first token, of ``batch`` sequences."""
        A_log = self.A_log
        return MambaState(
            A_log.new_zeros(batch, self.d_conv - 1, self.inner_dims),
            A_log.new_zeros((batch, *A_log.shape), dtype=compute_dtype(A_log.dtype)))

    def _mix(self, xz: Tensor) -> Tensor:
        return self._inner(xz) if self._is_one_op() else self._direction(xz)


class BiMambaMixer(_Mixer):
    """Two directions with parameters of their own, added (Vim, VideoMamba, ViViM).

    Each has a convolution, projections, A and D, and the gate; ``in_proj`` and ``out_proj`` are
    shared (algorithm 1, arXiv 2401.09417). The backward direction runs from the last token to the
    first.

    Args:
        embed_dims: C, channels of a token.
        reduce: 'sum' of the directions, or their 'mean'.
        out_norm: an RMSNorm of the result before ``out_proj``, named ``norm``.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale: as of :class:`MambaMixer`.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    directions = '', '_b'

    def __init__(self, embed_dims: int, *, reduce: str = 'sum', out_norm: bool = False, **kwargs):
        if reduce not in ('sum', 'mean'):
            raise ValueError(f"reduce={reduce!r} does not exist; choose 'sum' or 'mean'")
        super().__init__(embed_dims, **kwargs)
        self.reduce = reduce
        self.norm = RMSNorm(self.inner_dims) if out_norm else None

    def _mix(self, xz: Tensor) -> Tensor:
        scale = 0.5 if self.reduce == 'mean' else 1.0
        if self._is_one_op():
            y = self._inner(xz, scale=scale)
        else:
            y = scale * (self._direction(xz) + self._direction(xz, '_b', reverse=True))
        return y if self.norm is None else self.norm(y).to(y.dtype)


class SharedBiMambaMixer(_Mixer):
    """Two directions that share all but A (version 1 of Vim's code), added.

    The convolution runs once, forward in time; both scans read its result, the backward one from
    the last token to the first.

    Args:
        embed_dims: C, channels of a token.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale: as of :class:`MambaMixer`.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, **kwargs):
        super().__init__(embed_dims, **kwargs)
        self.A_b_log = nn.Parameter(init_A_logs(1, self.inner_dims, self.d_state))

    def _mix(self, xz: Tensor) -> Tensor:
        x, z = xz.chunk(2, dim=-1)
        inputs = self._scan_inputs(self._convolve(self.conv1d, x), z)
        return self._scan(inputs, self.A_log) + self._scan(inputs, self.A_b_log, reverse=True)


class DecomposedBiMambaMixer(_Mixer):
    """DBM: two directions with inputs of their own and the same parameters (section 3.2, arXiv
    2403.09626).

    ``in_proj`` gives x and z of the forward direction, then those of the backward one; the results
    lie side by side, forward first, before ``out_proj``, whose input has 2D channels.

    Args:
        embed_dims: C, channels of a token.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale: as of :class:`MambaMixer`.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    widths = 4, 2

    def _mix(self, xz: Tensor) -> Tensor:
        forward, backward = xz.chunk(2, dim=-1)
        run = self._inner if self._is_one_op() else self._direction
        return torch.cat([run(forward), run(backward, reverse=True)], dim=-1)


class MultiPathMixer(_Mixer):
    """One mixer for several orders of the same tokens (RSMamba, section II-C, arXiv 2403.19654).

    The tokens go through convolution and scan as they come, from the last one to the first, and in
    the order of a permutation, each time with the same parameters. The results, back in the order
    of the tokens, are averaged, or weighted by a softmax of ``gate``, a Linear that reads the mean
    over the tokens of each path's result. ``in_proj`` and ``out_proj`` know no order, so all paths
    share one product.

    Args:
        embed_dims: C, channels of a token.
        paths: 1 for the tokens as they come, 2 for the reverse as well, 3 for a permutation too.
        gated: whether there is a gate, or the mean of the paths; one path alone has neither.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale: as of :class:`MambaMixer`.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, *, paths: int = 3, gated: bool = True, **kwargs):
        if paths not in (1, 2, 3):
            raise ValueError(f'paths={paths!r} does not exist; choose 1, 2 or 3')
        super().__init__(embed_dims, **kwargs)
        self.paths = paths
        has_gate = gated and paths > 1
        self.gate = nn.Linear(paths * embed_dims, paths, bias=False) if has_gate else None

    def forward(self, x: Tensor, permutation: Tensor | None = None) -> Tensor:
        """The mixer's result.

        Args:
            x: (B, L, C).
            permutation: (L) of integers, the order of the tokens in the third path.

        Raises:
            ValueError: if there is a permutation without a third path, or none with it.
        """
        if (permutation is None) == (self.paths == 3):
            wants = 'needs a permutation' if self.paths == 3 else 'takes no permutation'
            raise ValueError(f'a mixer of {self.paths} paths {wants}')
        xz = self.in_proj(x)
        run = self._inner if self._is_one_op() else self._direction
        ys = [run(xz)]
        if self.paths > 1:
            ys.append(run(xz, reverse=True))
        if permutation is not None:
            ys.append(run(xz[:, permutation])[:, permutation.argsort()])
        if self.gate is None:
            return self._project_out(sum(ys) / self.paths)
        means = self._project_out(torch.stack([y.mean(1) for y in ys], dim=1))  # (B, P, C)
        weights = self.gate(means.flatten(1)).softmax(dim=-1).to(xz.dtype)
        return self._project_out(sum(weights[:, i, None, None] * y for i, y in enumerate(ys)))


class TriMambaMixer(_Mixer):
    """ToM: three orders of the tokens of a volume with parameters of their own, added (SegMamba,
    section 2.2, arXiv 2401.13560).

    The tokens run forward, slice by slice, from the last one back, and across the slices: the first
    token of every slice, then the second of every slice, and so on. Each order has a convolution,
    projections, A and D, and the gate; ``in_proj`` and ``out_proj`` are shared. Only the forward
    one starts with Mamba's values for ``dt_proj``, the others as ``nn.Linear`` does, which is what
    the published code does.

    Forward and backward are one op on the tokens as they lie. No stride leads through the third
    order, as each of its rounds begins anew: it takes a copy there and one back.

    Args:
        embed_dims: C, channels of a token.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, layer_scale: as of :class:`MambaMixer`.

    Shape: (B, L, C) -> (B, L, C).

    Raises:
        ValueError: on a value that is not allowed.
    """

    directions = '', '_b', '_s'

    def _add_direction(self, suffix, conv_bias):
        super()._add_direction(suffix, conv_bias)
        if suffix:
            self.get_submodule(f'dt_proj{suffix}').reset_parameters()

    def forward(self, x: Tensor, num_slices: int) -> Tensor:
        """The mixer's result.

        Args:
            x: (B, L, C).
            num_slices: into how many the sequence is cut for the third order, as of
                :func:`vmamba_mm.ops.across_slices`.
        """
        xz = self.in_proj(x)
        across = across_slices(xz, num_slices)
        if self._is_one_op():
            y, y_s = self._inner(xz, directions=('', '_b')), self._inner(across, directions=('_s',))
        else:
            y = self._direction(xz) + self._direction(xz, '_b', reverse=True)
            y_s = self._direction(across, '_s')
        return self._project_out(y + along_slices(y_s, num_slices))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Parameters of K directions: (K, ...), of one direction without a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def is_causal_conv(module: nn.Module) -> bool:
    """Whether ``module`` is the depthwise convolution of a mixer, and nobody watches it."""
    return is_plain(module, nn.Conv1d) and is_depthwise_causal(module)


def convolve(conv: nn.Module, x: Tensor, tail: Tensor | None = None, *, silu: bool = True,
             reverse: bool = False) -> Tensor:
    """The causal convolution of a mixer, as the op unless somebody watches the module.

    Args:
        conv: of each channel by itself, with W - 1 zeros on both sides.
        x: (B, L, D).
        tail: (B, W - 1, D), what came before; None for zeros.
        silu: whether SiLU follows.
        reverse: of the op alone: what comes later is convolved.

    Returns:
        (B, L, D).
    """
    if is_causal_conv(conv):
        return causal_conv(x, conv.weight.squeeze(1), conv.bias, silu=silu, reverse=reverse,
                           initial_state=tail)
    seen = x if tail is None else torch.cat([tail, x], dim=1)
    start = seen.shape[1] - x.shape[1]
    y = conv(seen.transpose(1, 2))[..., start:start + x.shape[1]].transpose(1, 2)
    return F.silu(y) if silu else y


def is_depthwise_causal(conv: nn.Conv1d) -> bool:
    """Whether ``conv`` is a convolution of each channel by itself with zeros before the first
    token, once what comes after the last one is cut off."""
    return (conv.groups == conv.in_channels == conv.out_channels
            and conv.padding == (conv.kernel_size[0] - 1,)
            and (conv.stride, conv.dilation, conv.padding_mode) == ((1,), (1,), 'zeros'))
