"""Initial values of the state-space parameters (Mamba, arXiv 2312.00752, section 3.6), and A."""

import math

import torch
from torch import Tensor


def init_x_proj(num_routes: int, out_features: int, dim: int) -> Tensor:
    """(K, out_features, D), each route as ``nn.Linear`` starts (kaiming uniform, a = sqrt 5)."""
    bound = 1.0 / math.sqrt(dim)
    return torch.empty(num_routes, out_features, dim).uniform_(-bound, bound)


def init_dt_proj(num_routes: int, dim: int, dt_rank: int) -> Tensor:
    """(K, D, R), uniform in +-R^-0.5, which keeps the variance of dt."""
    bound = dt_rank ** -0.5
    return torch.empty(num_routes, dim, dt_rank).uniform_(-bound, bound)


def init_dt_bias(num_routes: int, dim: int, dt_min: float = 1e-3, dt_max: float = 0.1,
                 floor: float = 1e-4) -> Tensor:
    """(K, D), such that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    log_dt = torch.empty(num_routes, dim).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp_(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def init_A_logs(num_routes: int, dim: int, d_state: int) -> Tensor:
    """(K*D, N), log(1..N) in every row: S4D-real."""
    return torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(num_routes * dim, 1)


def init_ssm(kind: str, num_routes: int, dim: int, d_state: int, dt_rank: int
             ) -> tuple[Tensor, Tensor, Tensor]:
    """dt_projs_weight (K, D, R), dt_projs_bias (K, D) and A_logs (K*D, N), A being -exp(A_logs).

    The three ways of table 11 (arXiv 2401.10166), with the numbers of the public code:

    - 'mamba': by the functions above.
    - 'random': A_logs normal of std 1, dt_projs normal of std 0.1.
    - 'zero': A_logs 0, that is A = -1, and dt_projs uniform in [0, 0.1), not 0.

    D is 1 in all of them, and x_proj starts as ``nn.Linear``.

    Raises:
        ValueError: on another ``kind``.
    """
    if kind == 'mamba':
        return (init_dt_proj(num_routes, dim, dt_rank), init_dt_bias(num_routes, dim),
                init_A_logs(num_routes, dim, d_state))
    weight, bias, A_logs = ((num_routes, dim, dt_rank), (num_routes, dim),
                            (num_routes * dim, d_state))
    if kind == 'random':
        return 0.1 * torch.randn(weight), 0.1 * torch.randn(bias), torch.randn(A_logs)
    if kind == 'zero':
        return 0.1 * torch.rand(weight), 0.1 * torch.rand(bias), torch.zeros(A_logs)
    raise ValueError(f"ssm_init={kind!r} does not exist; choose 'mamba', 'random' or 'zero'")


def state_matrix(A_logs: Tensor) -> Tensor:
    """A = -exp(A_logs), in fp32 at least: the rounding errors of a half would grow in exp."""
    return -torch.exp(A_logs if A_logs.dtype == torch.float64 else A_logs.float())
