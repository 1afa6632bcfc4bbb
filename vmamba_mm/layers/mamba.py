"""Stand-in until branch vim is merged."""
from typing import NamedTuple
import torch, math
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn, Tensor
from vmamba_mm.layers.ssm_init import init_A_logs, init_dt_bias, init_dt_proj

class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__(); self.weight = nn.Parameter(torch.ones(dim)); self.eps = eps
    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)

class MambaState(NamedTuple):
    conv: Tensor
    ssm: Tensor

class MambaMixer(nn.Module):
    def __init__(self, embed_dims, *, d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True, bias=False):
        super().__init__()
        inner = int(expand * embed_dims); rank = -(-embed_dims // 16) if dt_rank == 'auto' else dt_rank
        self.rank, self.d_state, self.d_conv, self.inner = rank, d_state, d_conv, inner
        self.in_proj = nn.Linear(embed_dims, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.dt_proj.weight = nn.Parameter(init_dt_proj(1, inner, rank)[0])
        self.dt_proj.bias = nn.Parameter(init_dt_bias(1, inner)[0])
        self.A_log = nn.Parameter(init_A_logs(1, inner, d_state)); self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, embed_dims, bias=bias)
    def init_state(self, batch):
        return MambaState(self.A_log.new_zeros(batch, self.d_conv - 1, self.inner), self.A_log.new_zeros(batch, *self.A_log.shape, dtype=torch.float32))
    def forward(self, x, state=None):
        given = state is not None
        state = state or self.init_state(len(x))
        x, z = self.in_proj(x).chunk(2, -1); L = x.shape[1]
        seen = torch.cat([state.conv.to(x.dtype), x], 1)
        u = F.silu(F.conv1d(seen.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, groups=self.inner))
        u = u.transpose(1, 2)
        dt, B, C = self.x_proj(u).split([self.rank, self.d_state, self.d_state], -1)
        dt = F.softplus(self.dt_proj(dt)).float(); A = -self.A_log.float().exp(); h = state.ssm; ys = []
        for t in range(L):
            h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1) + self.D * u[:, t])
        y = self.out_proj((torch.stack(ys, 1) * F.silu(z)).to(z.dtype))
        return (y, MambaState(seen[:, L:], h)) if given else y

class MambaBlock(nn.Module):
    def __init__(self, mixer, norm, drop_path=0.0, with_cp=False):
        super().__init__(); self.mixer, self.norm, self.with_cp = mixer, norm, with_cp
    def forward(self, hidden, residual=None, *, state=None):
        if self.with_cp and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, hidden, residual, state, use_reentrant=False)
        return self._forward(hidden, residual, state)
    def _forward(self, hidden, residual, state):
        residual = hidden.float() if residual is None else residual + hidden
        x = self.norm(residual).to(hidden.dtype)
        y = self.mixer(x) if state is None else self.mixer(x, state)
        return (y, residual) if state is None else (y[0], residual, y[1])
