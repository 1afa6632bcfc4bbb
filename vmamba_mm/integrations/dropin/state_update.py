"""``selective_state_update`` of mamba_ssm: one step of the scan, the state changed in place."""

from torch import Tensor

from vmamba_mm.ops import selective_scan_step
from vmamba_mm.ops.core.backends import compute_dtype


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                           D: Tensor | None = None, z: Tensor | None = None,
                           dt_bias: Tensor | None = None, dt_softplus: bool = False,
                           state_batch_indices: Tensor | None = None) -> Tensor:
    """The next position of a selective scan.

    Args:
        state: (B, D, N), or (B, H, P, N) with heads; changed in place.
        x, dt, z: (B, D), or (B, H, P); ``z`` may be None.
        A: (D, N), or (H, P, N).
        B, C: (B, N), or (B, G, N) for G groups of channels or heads.
        D, dt_bias: (D), or (H, P), or None.
        dt_softplus: softplus of dt, after the bias.
        state_batch_indices: (B), the rows of a larger ``state`` to use.

    Returns:
        As ``x``.
    """
    if state_batch_indices is not None:
        rows = state[state_batch_indices]
        y = selective_state_update(rows, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state[state_batch_indices] = rows
        return y

    def flat(t: Tensor | None, dims: int) -> Tensor | None:
        """Heads and channels of one head as one dimension, which has ``dims`` behind it."""
        if t is None or state.dim() == 3:
            return t
        return t.flatten(t.dim() - dims - 2, t.dim() - dims - 1)

    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    before = flat(state, 1).to(compute_dtype(x.dtype))
    y, new = selective_scan_step(
        before, flat(x, 0), flat(dt, 0), flat(A, 1), B, C, flat(D, 0), z=flat(z, 0),
        delta_bias=flat(dt_bias, 0), delta_softplus=dt_softplus)
    state.copy_(new.view(state.shape))
    return y.view(x.shape)
