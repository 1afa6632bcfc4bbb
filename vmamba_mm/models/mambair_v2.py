"""MambaIRv2: attentive state-space models for image restoration (arXiv 2411.15269)."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.families.mambair_v2 import FAMILY
from vmamba_mm.layers import LayerNorm
from vmamba_mm.layers.ssm_init import (
    init_A_logs,
    init_dt_bias,
    init_dt_proj,
    init_x_proj,
    state_matrix,
)
from vmamba_mm.models.base import init_linear
from vmamba_mm.models.restorer import (
    GroupRestorer,
    ResidualGroup,
    body_conv,
    on_channels_first,
    run_block,
)
from vmamba_mm.ops import selective_scan
from vmamba_mm.ops.core.backends import compute_dtype
from vmamba_mm.registry import MODELS

#: When Gumbel noise is added to the routes of tokens, for ``MambaIRv2(routing_noise=...)``.
ROUTING_NOISE = ('train', 'always', 'never')
#: Added to the attention between pixels that only a shift has brought together.
MASKED = -100.0


# --- feed-forward networks ------------------------------------------------------------------------

class ConvFFN(nn.Module):
    """Linear, GELU, x + GELU(depthwise convolution of x), Linear.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int, kernel_size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.ModuleDict(dict(depthwise_conv=nn.Sequential(
            nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden),
            nn.GELU())))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + on_channels_first(self.dwconv['depthwise_conv'], x))


class _SpatialGate(nn.Module):
    """One half of the channels times a depthwise convolution of the other half's LayerNorm."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * on_channels_first(self.conv, self.norm(b))


class GatedFFN(nn.Module):
    """Linear, GELU, a gate of half the channels by the other half, Linear, in the light models.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int, kernel_size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.sg = _SpatialGate(hidden // 2, kernel_size)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.sg(F.gelu(self.fc1(x))))


_FFNS = dict(conv=ConvFFN, gated=GatedFFN)


# --- attention in windows -------------------------------------------------------------------------

class WindowAttention(nn.Module):
    """Attention within windows of w * w pixels, with a bias for each relative position (Swin).

    Args:
        dim: C.
        window_size: w.
        num_heads: of which each has C / num_heads channels.

    Shape: queries, keys and values (B, H, W, 3C), H and W multiples of w -> (B, H, W, C).
    """

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            qkv: (B, H, W, 3C).
            index: (w^2, w^2), the row of the table for each pair, see :func:`relative_positions`.
            mask: (windows of an image, w^2, w^2), added, or None.
        """
        batch, height, width, _ = qkv.shape
        size, heads = self.window_size, self.num_heads
        rows, columns = height // size, width // size
        windows = qkv.view(batch, rows, size, columns, size, 3, heads, -1)
        q, k, v = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
            3, batch * rows * columns, heads, size ** 2, -1).unbind()
        bias = self.relative_position_bias_table[index.flatten()].view(
            size ** 2, size ** 2, heads).permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None].to(bias)).repeat(batch, 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = y.view(batch, rows, columns, heads, size, size, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.proj(y.reshape(batch, height, width, -1))


def relative_positions(size: int) -> Tensor:
    """(w^2, w^2) int64: which of (2w - 1)^2 relative positions each pair of pixels has."""
    ys, xs = (t.flatten() for t in torch.meshgrid(torch.arange(size), torch.arange(size),
                                                  indexing='ij'))
    dy, dx = ys[:, None] - ys, xs[:, None] - xs
    return (dy + size - 1) * (2 * size - 1) + dx + size - 1


def shift_mask(height: int, width: int, size: int, shift: int, device: torch.device) -> Tensor:
    """(windows, w^2, w^2) of 0, and of ``MASKED`` between pixels that are not neighbours.

    Args:
        height, width: of the map, multiples of ``size``.
        size: of a window.
        shift: by which the map is rolled up and to the left.
    """
    def regions(n):
        place = torch.arange(n, device=device)
        return (place >= n - size).long() + (place >= n - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)
    windows = region.view(height // size, size, width // size, size).transpose(1, 2).reshape(
        -1, size ** 2)
    return torch.where(windows[:, :, None] == windows[:, None], 0.0, MASKED)


# --- the scan of sorted tokens --------------------------------------------------------------------

class _ScanWeights(nn.Module):
    """The parameters of one causal scan, with the names and shapes of the public code."""

    def __init__(self, inner: int, d_state: int, dt_rank: int):
        super().__init__()
        self.x_proj_weight = nn.Parameter(init_x_proj(1, dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(init_dt_proj(1, inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(init_dt_bias(1, inner))
        self.A_logs = nn.Parameter(init_A_logs(1, inner, d_state))
        self.Ds = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Scan tokens (B, L, D); ``prompt`` (B, L, N) is added to C_t."""
        d_state = self.A_logs.shape[1]
        rank = self.dt_projs_weight.shape[-1]
        dt, b, c = F.linear(x, self.x_proj_weight[0]).split([rank, d_state, d_state], dim=-1)
        dt = F.linear(dt, self.dt_projs_weight[0])
        b, c = (t.transpose(1, 2)[:, None] for t in (b, c + prompt))
        y = selective_scan(
            x.transpose(1, 2), dt.transpose(1, 2), state_matrix(self.A_logs), b, c,
            self.Ds, delta_bias=self.dt_projs_bias[0], delta_softplus=True,
            out_dtype=compute_dtype(x.dtype))
        return y.transpose(1, 2)


class TokenScan(nn.Module):
    """The attentive state-space module: one scan of tokens in the order of their classes.

    Each token is routed to one of T classes, which gives it a prompt that is added to C_t, and its
    place in the scan: tokens of a class follow one another, in the order of the image. As in the
    public code, **the prompt of a place of the scan is that of the pixel with this number**, in the
    order of the image, and not that of the token at this place.

    Args:
        dim: C.
        d_state: N.
        num_tokens: T.
        inner_rank: rank of the matrix (T, N) of prompts.
        mlp_ratio: D / C of the scan.
        noise: of ``ROUTING_NOISE``.
        stable_sort: whether tokens of a class keep their order; else they are in that of
            ``torch.sort`` on a CPU, see :class:`MambaIRv2`.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, d_state: int, num_tokens: int, inner_rank: int,
                 mlp_ratio: float, noise: str = 'train', stable_sort: bool = True):
        super().__init__()
        inner = int(dim * mlp_ratio)
        self.noise, self.stable_sort = noise, stable_sort
        self.selectiveScan = _ScanWeights(inner, d_state, -(-inner // 16))
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim)
        self.in_proj = nn.Sequential(nn.Conv2d(dim, inner, 1))
        self.CPE = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, groups=inner))
        self.embeddingB = nn.Embedding(num_tokens, inner_rank)
        nn.init.uniform_(self.embeddingB.weight, -1 / num_tokens, 1 / num_tokens)
        self.route = nn.Sequential(nn.Linear(dim, dim // 3), nn.GELU(),
                                   nn.Linear(dim // 3, num_tokens), nn.LogSoftmax(-1))

    def forward(self, x: Tensor, embedding: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scan.

        Args:
            x: (B, H, W, C).
            embedding: (rank, N), the layer's half of the prompts.
            noise: (B, H*W, T), added to the logits of the classes; None for none, or for Gumbel
                noise where the module draws it itself.
        """
        batch, height, width, _ = x.shape
        logits = self.route(x.flatten(1, 2))
        if noise is None and (self.noise == 'always' or self.noise == 'train' and self.training):
            noise = -torch.empty_like(logits).exponential_().log()
        if noise is not None:
            logits = logits + noise
        # The straight-through estimator: one class forward, the softmax's gradient backward.
        soft = logits.softmax(-1)
        classes = logits.argmax(-1)
        hard = F.one_hot(classes, logits.shape[-1]).to(soft.dtype)
        policy = hard + (soft - soft.detach())
        prompt = policy @ (self.embeddingB.weight @ embedding)

        y = on_channels_first(self.in_proj, x)
        y = y * torch.sigmoid(on_channels_first(self.CPE, y))
        if self.stable_sort:
            order = classes.argsort(dim=-1, stable=True)
        else:
            order = classes.cpu().sort(dim=-1, stable=False)[1].to(x.device)
        tokens = _take(y.flatten(1, 2), order)
        y = self.out_norm(self.selectiveScan(tokens, prompt))
        y = self.out_proj(y.to(tokens.dtype))
        return _take(y, order.argsort(dim=-1)).unflatten(1, (height, width))


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, L, C) in another order (B, L)."""
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))


# --- the network ----------------------------------------------------------------------------------

class AttentiveLayer(nn.Module):
    """Attention in windows and an FFN, then a scan and an FFN, each half beside its scaled input.

    Args:
        dim: C.
        num_heads: of the attention.
        arch: of the network.
        shift: by which its windows are shifted, 0 for none.
        noise, stable_sort: of :class:`TokenScan`.
        with_cp: recompute the layer in the backward pass.

    Shape: (B, H, W, C) -> (B, H, W, C), H and W multiples of the window.
    """

    def __init__(self, dim: int, num_heads: int, arch: dict[str, Any], shift: int, noise: str,
                 stable_sort: bool, with_cp: bool):
        super().__init__()
        self.with_cp, self.shift = with_cp, shift
        ratio, size = arch['mlp_ratio'], arch['window_size']
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-4))
        for i in range(1, 5):
            self.add_module(f'norm{i}', LayerNorm(dim))
        self.wqkv = nn.Linear(dim, 3 * dim)
        self.win_mhsa = WindowAttention(dim, size, num_heads)
        self.assm = TokenScan(dim, arch['d_state'], arch['num_tokens'], arch['inner_rank'], ratio,
                              noise, stable_sort)
        ffn = _FFNS[arch['ffn']]
        self.convffn1 = ffn(dim, int(dim * ratio), arch['conv_kernel'])
        self.convffn2 = ffn(dim, int(dim * ratio), arch['conv_kernel'])
        self.embeddingA = nn.Embedding(arch['inner_rank'], arch['d_state'])
        nn.init.uniform_(self.embeddingA.weight, -1 / arch['inner_rank'], 1 / arch['inner_rank'])

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None = None,
                noise: Tensor | None = None) -> Tensor:
        """Run the layer; ``index`` and ``mask`` of the attention, ``noise`` of the scan."""
        return run_block(self, x, index, mask, noise)

    def _forward(self, x, index, mask, noise):
        qkv, shift = self.wqkv(self.norm1(x)), self.shift
        if shift:
            qkv = qkv.roll((-shift, -shift), dims=(1, 2))
        y = self.win_mhsa(qkv, index, mask)
        if shift:
            y = y.roll((shift, shift), dims=(1, 2))
        y = y + x
        x = x * self.scale1 + self.convffn1(self.norm2(y)) + y
        y = self.assm(self.norm3(x), self.embeddingA.weight, noise) + x
        return x * self.scale2 + self.convffn2(self.norm4(y)) + y


@MODELS.register_module()
class MambaIRv2(GroupRestorer):
    """MambaIRv2, of super-resolution, denoising and JPEG artefacts.

    Its weights have the official names; files of the public code, a dict with ``params`` or
    ``params_ema``, load by ``load_pretrained`` as they are.

    **Routes of tokens.** The public code adds random Gumbel noise to the logits of the classes
    whenever it runs, in evaluation too, so that it gives another image each time. Here noise is
    drawn in training alone by default, and evaluation takes the likeliest class.

    Args:
        arch: a key of ``MambaIRv2.arch_settings``, or a dict with the keys ``embed_dims`` (C),
            ``depths`` and ``num_heads`` (layers and heads of each residual group), ``d_state`` (N),
            ``window_size``, ``inner_rank`` and ``num_tokens`` (of :class:`TokenScan`),
            ``mlp_ratio`` (of the FFNs and the scan), ``ffn`` ('conv', or 'gated' in the light
            models), ``conv_kernel`` (in them), and ``resi_connection``, ``upsampler`` and
            ``upscale`` as of :class:`vmamba_mm.models.MambaIR`. With ``base``, the name of a
            published one, only the keys that differ from it.
        in_channels, img_range, with_cp, init_cfg: as of :class:`vmamba_mm.models.MambaIR`.
        routing_noise: when Gumbel noise is drawn: 'train', 'always' as in the public code, or
            'never'.
        stable_sort: whether the tokens of a class are scanned in the order of the image. The public
            code leaves their order to ``torch.sort`` without ``stable``; that of a CPU depends on
            the instructions that it has. False for the order of this machine's CPU, on whatever
            device, to compare with numbers that were made on such a CPU.

    Shape:
        (B, in_channels, H, W), any H and W, with values in [0, 1], to
        (B, in_channels, upscale * H, upscale * W), which is not clipped. An image whose sides are
        no multiples of the window is mirrored beyond its right and lower border first, the border
        pixels twice, which is cut off again. The public code fails where a side is smaller than
        what has to be added; here it is mirrored once more.

    Raises:
        ValueError: on a value that is not allowed, with the choices; when called, on an image of
            other channels, or another number of ``noise`` tensors than layers.
    """

    family = FAMILY

    def __init__(self, arch: str | dict[str, Any], in_channels: int = 3, img_range: float = 1.0,
                 routing_noise: str = 'train', stable_sort: bool = True, with_cp: bool = False,
                 init_cfg: dict | list[dict] | None = None):
        if routing_noise not in ROUTING_NOISE:
            raise ValueError(f'routing_noise={routing_noise!r} does not exist; choose one of '
                             f'{ROUTING_NOISE}')
        self.routing_noise, self.stable_sort = routing_noise, stable_sort
        super().__init__(arch, in_channels, img_range, 0.0, with_cp, init_cfg)

    def build(self, drop_path_rate: float) -> None:
        # Before all else, as in the state dicts of the public code.
        self.register_buffer('relative_position_index_SA',
                             relative_positions(self.arch['window_size']))
        super().build(drop_path_rate)
        self.apply(init_linear)

    def build_groups(self, rates: Sequence[Sequence[float]]) -> Iterable[nn.Module]:
        dim, arch = self.arch['embed_dims'], self.arch
        for group, heads in zip(rates, arch['num_heads'], strict=True):
            layers = [AttentiveLayer(dim, heads, arch, i % 2 * (arch['window_size'] // 2),
                                     self.routing_noise, self.stable_sort, self.with_cp)
                      for i in range(len(group))]
            yield ResidualGroup(layers, body_conv(dim, arch['resi_connection']), 'layers')

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Restore images.

        Args:
            x: (B, in_channels, H, W).
            noise: for each layer (B, L, num_tokens), added to the logits of its classes, of the
                L pixels after padding; None for what ``routing_noise`` says.
        """
        self.check_image(x)
        count = sum(self.arch['depths'])
        if noise is not None and len(noise) != count:
            raise ValueError(f'noise must have a tensor for each of the {count} layers, got '
                             f'{len(noise)}')
        height, width = x.shape[2:]
        padded = mirror_to_multiple(x, self.arch['window_size'])
        y = self.restore(padded, lambda y: self._run_groups(y, noise))
        return y[..., :height * self.scale, :width * self.scale]

    def _run_groups(self, x: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
        size, depths = self.arch['window_size'], self.arch['depths']
        mask = None
        if size > 1 and max(depths) > 1:
            mask = shift_mask(*x.shape[1:3], size, size // 2, x.device)
        first = 0
        for group, depth in zip(self.layers, depths, strict=True):
            x = group(x, [self.relative_position_index_SA] * depth,
                      [mask if i % 2 else None for i in range(depth)],
                      [None] * depth if noise is None else noise[first:first + depth])
            first += depth
        return x


def mirror_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W), mirrored at their lower and right border up to multiples.

    The border pixel comes twice; what is too small is mirrored again.
    """
    for dim in (2, 3):
        length = -(-x.shape[dim] // multiple) * multiple
        while x.shape[dim] < length:
            x = torch.cat([x, x.flip(dim)], dim=dim)
        x = x.narrow(dim, 0, length)
    return x
