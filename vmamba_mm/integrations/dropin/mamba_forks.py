"""The two other mixers of Video Mamba Suite's fork (arXiv 2403.09626)."""

import torch
from torch import Tensor

from vmamba_mm.integrations.dropin.mamba_simple import Mamba
from vmamba_mm.integrations.dropin.norms import RMSNorm


class DecomposedMamba(Mamba):
    """``Mamba`` of ``mamba_ssm.modules.mamba_new``, DBM: half of in_proj's result is read forwards,
    the other half backwards, both with the same parameters; the results lie side by side."""

    widths = 4, 2

    def _run(self, xz: Tensor) -> Tensor:
        forward, backward = xz.chunk(2, -1)
        return torch.cat([self._mix(forward, ('',)), self._mix(backward, ('',), reverse=True)], -1)

    def _refuse_directions(self) -> None:
        raise ValueError('a Mamba of mamba_ssm.modules.mamba_new reads a sequence in both '
                         'directions and cannot decode token by token')


class NormedMamba(Mamba):
    """``Mamba`` of ``mamba_ssm.modules.mamba_simple_scan_norm``: with ``if_devide_out`` an RMSNorm
    of the sum of both directions takes the place of the mean."""

    def _add_before_out_proj(self, options: dict) -> None:
        self.norm = RMSNorm(self.d_inner, eps=1e-5, **options)

    def _run(self, xz: Tensor) -> Tensor:
        if self.bimamba_type != 'v2' or not self.if_divide_out:
            return super()._run(xz)
        return self.norm(self._mix(xz, ('', '_b')))
