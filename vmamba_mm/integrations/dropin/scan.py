"""``selective_scan_fn`` with mamba_ssm's arguments, on :func:`vmamba_mm.ops.selective_scan`."""

from torch import Tensor

from vmamba_mm.ops import selective_scan


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                      D: Tensor | None = None, z: Tensor | None = None,
                      delta_bias: Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False):
    """The selective scan of mamba_ssm.

    Args:
        u, delta: (B, D, L).
        A: (D, N), real.
        B, C: (B, N, L) or (B, G, N, L), where G groups of D/G channels each share one, or (D, N),
            the same at every position.
        D: (D), the skip, or None.
        z: (B, D, L); the result is multiplied by silu(z).
        delta_bias: (D), or None.
        delta_softplus: softplus of ``delta``, after the bias.
        return_last_state: also return the state after the last position, (B, D, N). Unlike
            mamba_ssm's it has a gradient.

    Returns:
        (B, D, L) in the dtype of ``u``, or this and the state.

    Raises:
        NotImplementedError: on a complex ``A``.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
                       D: Tensor | None = None, z: Tensor | None = None,
                       delta_bias: Tensor | None = None, delta_softplus: bool = False,
                       return_last_state: bool = False):
    """:func:`selective_scan_fn` as a loop over positions; in fp64 where ``u`` is."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
                 'reference')


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, backend):
    refuse_complex(A)
    B, C = in_groups(B, C, u)
    return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias,
                          delta_softplus=delta_softplus, return_final_state=return_last_state,
                          backend=backend)


def refuse_complex(A: Tensor) -> None:
    """Raise NotImplementedError on a complex ``A``."""
    if A.is_complex():
        raise NotImplementedError(f'the selective scan of vmamba_mm.dropin takes a real A, got '
                                  f'{A.dtype}; S4 with complex states needs mamba_ssm itself')


def in_groups(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``B`` and ``C`` in any form that mamba_ssm takes, as (B, G, N, L) with one G."""
    batch, channels, length = u.shape
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    groups = max(channels if t.dim() == 2 else t.shape[1] for t in (B, C))

    def expand(t: Tensor) -> Tensor:
        if t.dim() == 2:  # of each channel, at every position
            return t[None, :, :, None].expand(batch, -1, -1, length).to(u.dtype)
        return t if t.shape[1] == groups else t.repeat_interleave(groups // t.shape[1], 1)

    return expand(B), expand(C)
