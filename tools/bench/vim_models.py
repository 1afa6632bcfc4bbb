"""Vim's classifiers for benchmarks, with the mixer of this package or as published.

The published mixer (github.com/hustvl/Vim) has a product for x and z with the channels first, then
for each direction a causal convolution, a product for dt, B and C, one for dt and a scan with the
gate. The backward direction reads a flipped copy, and its result is flipped again; the sum of both
goes through the last product.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.layers import BiMambaMixer
from vmamba_mm.models import Vim
from vmamba_mm.ops import causal_conv, selective_scan

#: model: the arch
VIMS = {f'vim_{size}': size for size in ('tiny', 'small', 'base')}
#: the same with :class:`PublishedMixer`, by mamba-ssm's scan and by this package's
PUBLISHED = {f'{name}_{size[0]}': size for name in ('mamba_ssm_vim', 'published_vim')
             for size in VIMS.values()}


class VimClassifier(nn.Module):
    """Vim and the head of the published classifiers, which reads the class token."""

    def __init__(self, arch: dict):
        super().__init__()
        self.backbone = Vim(arch, out_type='cls_token')
        self.head = nn.Linear(self.backbone.num_features[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0])


def make_vim(name: str, output: str, height: int, width: int) -> nn.Module:
    """One of ``VIMS`` or ``PUBLISHED``: a classifier, or a backbone if ``output`` is 'maps'."""
    arch = dict(base=VIMS.get(name) or PUBLISHED[name], image_size=(height, width))
    if output == 'maps':
        model = Vim(arch, out_indices=(5, 11, 17, 23))
    else:
        model = VimClassifier(arch)
    if name in VIMS:
        return model
    return publish(model, scan_of_mamba_ssm() if name.startswith('mamba_ssm') else selective_scan)


def scan_of_mamba_ssm():
    """mamba-ssm's CUDA scan.

    Raises:
        ModuleNotFoundError: if its extension was not built here.
    """
    import selective_scan_cuda  # noqa: F401 (without it mamba_ssm's Python code has no scan)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn


class PublishedMixer(BiMambaMixer):
    """:class:`BiMambaMixer`, of which it has the parameters, step by step.

    The convolutions are this package's op ``causal_conv``; ``scan`` is its ``selective_scan``, or
    mamba-ssm's function of the same arguments.
    """

    scan = staticmethod(selective_scan)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        xz = (self.in_proj.weight @ x.flatten(0, 1).T).view(-1, batch, length).transpose(0, 1)
        y = published_direction(self, xz) + published_direction(self, xz.flip(-1), '_b').flip(-1)
        return self.out_proj((y / 2 if self.reduce == 'mean' else y).transpose(1, 2))


def published_direction(mixer: nn.Module, xz: Tensor, suffix: str = '') -> Tensor:
    """A direction of a mixer that has a ``scan``: (B, 2D, L), x before z, to (B, D, L).

    Args:
        suffix: of the names of the direction's parameters.
    """
    batch, _, length = xz.shape
    conv, x_proj, dt_proj = (getattr(mixer, name + suffix)
                             for name in ('conv1d', 'x_proj', 'dt_proj'))
    x, z = xz.chunk(2, dim=1)
    u = causal_conv(x.transpose(1, 2), conv.weight.squeeze(1), conv.bias).transpose(1, 2)
    projected = F.linear(u.transpose(1, 2).flatten(0, 1), x_proj.weight)
    dt, B, C = projected.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=1)
    delta = (dt_proj.weight @ dt.T).view(-1, batch, length).transpose(0, 1)
    B, C = (t.view(batch, 1, length, mixer.d_state).transpose(2, 3).contiguous() for t in (B, C))
    A, D = -getattr(mixer, f'A{suffix}_log').float().exp(), getattr(mixer, f'D{suffix}').float()
    return mixer.scan(u, delta, A, B, C, D, z=z, delta_bias=dt_proj.bias.float(),
                      delta_softplus=True)


def publish(model: nn.Module, scan=selective_scan) -> nn.Module:
    """The same model with :class:`PublishedMixer` in the place of each :class:`BiMambaMixer`, whose
    parameters it takes over."""
    for block in model.modules():
        if isinstance(getattr(block, 'mixer', None), BiMambaMixer):
            given = block.mixer
            mixer = PublishedMixer(
                given.in_proj.in_features, reduce=given.reduce, d_state=given.d_state,
                d_conv=given.d_conv, expand=given.inner_dims / given.in_proj.in_features,
                dt_rank=given.dt_rank, conv_bias=given.conv1d.bias is not None)
            mixer.load_state_dict(given.state_dict())
            mixer.scan = scan
            block.mixer = mixer.to(given.D).train(given.training)
    return model
