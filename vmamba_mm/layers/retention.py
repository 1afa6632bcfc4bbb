"""Multi-scale retention and the block of RetNet (arXiv 2307.08621)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers.mamba_blocks import MambaBlock, add_and_norm
from vmamba_mm.ops import retention, retention_step
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.ops.retention import log_decays
from vmamba_mm.ops.rotation import rotate_pairs, rotation_table

FORMS = ('chunkwise', 'parallel')
#: The most that the parallel form divides scores by.
_MOST = 5e4


class RetentionState(NamedTuple):
    """What retention keeps of the tokens that it has seen."""

    memory: Tensor  #: (B, H, P, N), the state of the op: fp32, or fp64 in a model of that dtype
    seen: Tensor  #: (B), how many tokens there were


class MultiScaleRetention(nn.Module):
    """Retention of several heads, each with a decay of its own, a norm and a gate (section 2.2).

    Queries and keys turn by their positions, then each head runs
    :func:`vmamba_mm.ops.retention`. Its result is divided by the square root of the sum of the
    decays that a token sees, as the authors' recurrent form has it, normalised by RMSNorm without
    weights, and multiplied by SiLU of a gate. Parameters have the names of ``torchscale``.

    Args:
        embed_dims: C, channels of a token, and of all queries and keys.
        value_dims: V, channels of all values.
        num_heads: H, which leaves each head an even number of queries and divides V.
        norm_eps: of the norm.
        form: 'chunkwise', linear in the length, or 'parallel', which is quadratic and also divides
            by the sum of each row of scores, as the authors train; the norm undoes that but for
            ``norm_eps``. With a state the form is always chunkwise.

    Shape: (B, L, C) -> (B, L, C), with a state that and the :class:`RetentionState` after it.

    Raises:
        ValueError: on a value that is not allowed.
    """

    def __init__(self, embed_dims: int, value_dims: int, num_heads: int = 1, norm_eps: float = 1e-6,
                 form: str = 'chunkwise'):
        super().__init__()
        if num_heads < 1 or embed_dims % (2 * num_heads) or value_dims % num_heads \
                or value_dims < 1:
            raise ValueError(f'num_heads={num_heads!r} must leave each head an even number of the '
                             f'{embed_dims} channels of queries, and divide the {value_dims} of '
                             'values')
        if form not in FORMS:
            raise ValueError(f'form={form!r} does not exist; choose one of {FORMS}')
        self.num_heads, self.norm_eps, self.form = num_heads, norm_eps, form
        self.q_proj, self.k_proj = (nn.Linear(embed_dims, embed_dims, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(embed_dims, value_dims, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(value_dims, embed_dims, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2 ** -2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2 ** -1)

    def forward(self, x: Tensor, state: RetentionState | None = None
                ) -> Tensor | tuple[Tensor, RetentionState]:
        """The mixer's result, and the new state if one is given, which is not changed.

        Args:
            x: (B, L, C).
            state: of the tokens before ``x``; None if there are none and nothing comes after.
        """
        decays = log_decays(self.num_heads, x)
        positions = torch.arange(x.shape[1], device=x.device)
        if state is not None:
            positions = state.seen[:, None] + positions
        q, k, v = self._project(x, positions)
        if state is None and self.form == 'parallel':
            return self._project_out(x, _attend(q, k, v, decays))
        q = (q * _scales(positions, decays)).to(q.dtype)
        if state is None:
            return self._project_out(x, retention(q, k, v, decays))
        if x.shape[1] == 1:
            y, memory = retention_step(state.memory, *(t.squeeze(1) for t in (q, k, v)), decays)
            y = y.unsqueeze(1)
        else:
            y, memory = retention(q, k, v, decays, initial_state=state.memory,
                                  return_final_state=True)
        return self._project_out(x, y), RetentionState(memory, state.seen + x.shape[1])

    def step(self, x: Tensor, state: RetentionState) -> tuple[Tensor, RetentionState]:
        """One more token: (B, C) and the state of the tokens before, which is not changed."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def init_state(self, batch: int) -> RetentionState:
        """The state before the first token, of ``batch`` sequences."""
        weight = self.q_proj.weight
        shape = (batch, self.num_heads, self.out_proj.in_features // self.num_heads,
                 weight.shape[0] // self.num_heads)
        return RetentionState(weight.new_zeros(shape, dtype=compute_dtype(weight.dtype)),
                              torch.zeros(batch, dtype=torch.long, device=weight.device))

    def _project(self, x, positions):
        q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)) for project in (
            self.q_proj, self.k_proj, self.v_proj))
        table = rotation_table(positions.unsqueeze(-1), q.shape[-1], q.dtype)
        return rotate_pairs(q, table), rotate_pairs(k * k.shape[-1] ** -0.5, table), v

    def _project_out(self, x, y):
        wide = y.to(compute_dtype(y.dtype))
        y = F.rms_norm(wide, wide.shape[-1:], eps=self.norm_eps).to(y.dtype)
        return self.out_proj(F.silu(self.g_proj(x)) * y.flatten(-2))


def _scales(positions: Tensor, decays: Tensor) -> Tensor:
    """(..., L, H, 1): 1 / sqrt(1 + gamma + ... + gamma^t) at position t."""
    sums = torch.expm1(decays * (positions.unsqueeze(-1) + 1)) / torch.expm1(decays)
    return sums.rsqrt().unsqueeze(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, decays: Tensor) -> Tensor:
    """The authors' parallel form: rows of scores are divided by their sum, which has no gradient.

    q and k (B, L, H, N), v (B, L, H, P), decays (H), to (B, L, H, P).
    """
    steps = torch.arange(q.shape[1], device=q.device)
    distance = steps[:, None] - steps
    mask = (decays[:, None, None] * distance).exp().masked_fill(distance < 0, 0)
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    scores = torch.einsum('blhn, bmhn -> bhlm', q, k) * mask
    scores = scores / scores.detach().abs().sum(-1, keepdim=True).clamp(1, _MOST)
    return torch.einsum('bhlm, bmhp -> blhp', scores.to(v.dtype), v)


class GatedMlp(nn.Module):
    """fc2(act(fc1 x) * gate x), without biases (arXiv 2002.05202).

    Args:
        dim: C.
        hidden: channels between.
        act: 'gelu' or 'silu', computed in fp32 at least.

    Shape: (..., C) -> (..., C).
    """

    def __init__(self, dim: int, hidden: int, act: str = 'gelu'):
        super().__init__()
        if act not in _ACTS:
            raise ValueError(f'act={act!r} does not exist; choose one of {tuple(_ACTS)}')
        self.fc1, self.gate = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        wide = hidden.to(compute_dtype(hidden.dtype))
        return self.fc2(_ACTS[self.act](wide).to(hidden.dtype) * self.gate(x))


_ACTS = {'gelu': F.gelu, 'silu': F.silu}


class RetNetBlock(MambaBlock):
    """The block of RetNet: a mixer and an MLP, each a residual branch with a norm.

    It takes and gives the streams of :class:`MambaBlock`: the result of the MLP, and the sum of all
    before it.

    Args:
        mixer: of tokens, such as :class:`MultiScaleRetention`.
        mlp: a module of tokens.
        norm, ffn_norm: of the last dimension, of what the mixer and the MLP take, or of their sums.
        alpha: what is in the stream is multiplied by it before either is added (DeepNorm, arXiv
            2203.00555).
        post_norm: norms come after the sums. Then there is no second stream.
        with_cp: recompute the block in the backward pass to save memory.

    Shape: (B, L, C) twice -> (hidden, residual) of the same shape; with ``post_norm`` the latter is
    None.
    """

    def __init__(self, mixer: nn.Module, mlp: nn.Module, norm: nn.Module, ffn_norm: nn.Module,
                 alpha: float = 1.0, post_norm: bool = False, with_cp: bool = False):
        super().__init__(mixer, norm, with_cp=with_cp)
        self.ffn, self.ffn_norm = mlp, ffn_norm
        self.alpha, self.post_norm = alpha, post_norm

    def _forward(self, hidden, residual, with_output, state):
        if self.post_norm:
            stream = x = hidden
        else:
            stream, x = add_and_norm(self.norm, hidden, residual)
        y, *states = (self.mixer(x),) if state is None else self.mixer(x, state)
        return *self._add_mlp(stream, y), *((y,) if with_output else ()), *states

    def step(self, hidden: Tensor, residual: Tensor | None, state: RetentionState
             ) -> tuple[Tensor, Tensor | None, RetentionState]:
        hidden, residual, state = self(
            hidden.unsqueeze(1), None if residual is None else residual.unsqueeze(1), state=state)
        return hidden.squeeze(1), None if residual is None else residual.squeeze(1), state

    def _add_mlp(self, stream, y):
        dtype = y.dtype
        total = stream * self.alpha + y
        if self.post_norm:
            x = self.norm(total).to(dtype)
            return self.ffn_norm(x * self.alpha + self.ffn(x)).to(dtype), None
        return self.ffn(self.ffn_norm(total).to(dtype)), total * self.alpha
