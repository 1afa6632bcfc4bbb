"""What tests, tools and benchmarks share: inputs for the ops, errors relative to scale."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_mm.ops import across_slices, linear_attention, ordered_scan, scan_positions
from vmamba_mm.ops.masa import decay_masks
from vmamba_mm.ops.retention import log_decays
from vmamba_mm.ops.rotation import map_rotation_table, rotary_attention, rotation_table
from vmamba_mm.ops.ss2d_scan.ordered import gather_routes, merge_routes

#: where op tests run: a machine with a GPU tests both
DEVICES = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, in fp64; NaN anywhere gives NaN.

    A scale below 1e-30 counts as 1e-30: fp32 holds no digits of such numbers' products.
    """
    expected = expected.double()
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def assert_close(actual: Tensor, expected: Tensor, rtol: float, what: str = 'result') -> None:
    """Raise AssertionError unless the shapes agree and ``relative_error`` is at most ``rtol``."""
    assert actual.shape == expected.shape, f'{what}: {actual.shape} is not {expected.shape}'
    error = relative_error(actual, expected)
    assert error <= rtol, f'{what}: relative error {error:.2e} is above {rtol:.2e}'


def selective_scan_inputs(batch: int, groups: int, dim: int, length: int, state: int, *,
                          dtype: torch.dtype = torch.float32, device: str = 'cpu',
                          seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``selective_scan`` of the magnitude that a trained model gives, in order."""
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device=device).to(dtype)

    channels = groups * dim
    return dict(u=randn(batch, channels, length), delta=randn(batch, channels, length),
                A=-randn(channels, state).exp(), B=randn(batch, groups, state, length),
                C=randn(batch, groups, state, length), D=randn(channels),
                delta_bias=randn(channels) - 1)


def ssd_inputs(batch: int, length: int, heads: int, dim: int, groups: int, state: int, *,
               dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of ssd on the CPU, always the same; parameters are fp32 (fp64 for fp64)."""
    rng = torch.Generator().manual_seed(0)
    single = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=single)

    shared = batch, length, groups, state
    return dict(x=randn(batch, length, heads, dim).to(dtype),
                dt=randn(batch, length, heads).to(dtype), A=-randn(heads).exp(),
                B=randn(*shared).to(dtype), C=randn(*shared).to(dtype), D=randn(heads),
                dt_bias=randn(heads) - 1)


def ss2d_scan_inputs(batch: int, dim: int, height: int, width: int, *, state: int = 1,
                     rank: int = 2, routes: int = 4, dtype: torch.dtype = torch.float32,
                     device: str = 'cpu', seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``ss2d_scan``, in order; ``x`` is channels last, as the model's."""
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device=device).to(dtype)

    x = randn(batch, dim, height, width).contiguous(memory_format=torch.channels_last)
    return dict(x=x, x_proj_weight=randn(routes, rank + 2 * state, dim) / dim ** 0.5,
                dt_projs_weight=randn(routes, dim, rank) / rank ** 0.5,
                dt_projs_bias=randn(routes, dim) - 1, A=-randn(routes * dim, state).exp(),
                D=randn(routes * dim))


def mamba_inner_inputs(batch: int, routes: int, dim: int, length: int, state: int, rank: int,
                       taps: int = 4, *, dtype: torch.dtype = torch.float32, device: str = 'cpu',
                       seed: int = 0) -> dict[str, Tensor]:
    """Arguments of ``mamba_inner`` of the magnitude that a trained model gives, in order."""
    rng = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64, device=device).to(dtype)

    return dict(xz=randn(batch, length, 2 * dim), conv_weight=randn(routes, dim, taps) / 2,
                conv_bias=randn(routes, dim),
                x_proj=randn(routes, rank + 2 * state, dim) / dim ** 0.5,
                dt_proj=randn(routes, dim, rank) / rank ** 0.5, dt_bias=randn(routes, dim) - 1,
                A=-randn(routes, dim, state).exp(), D=randn(routes, dim))


def run_ordered_scan(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor,
                     dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor, *, scan: str) -> Tensor:
    """``ordered_scan`` by the parameters of SS2D: (B, D, H, W) to (B, H, W, D)."""
    y = ordered_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, -A_logs.exp(), Ds, scan=scan)
    return y.permute(0, 2, 3, 1)


def gather_and_merge(x: Tensor, ys: Tensor, *, scan: str) -> tuple[Tensor, Tensor]:
    """The routes of a map and the sum of routes in place, (B, K, D, L) and (B, D, L).

    Args:
        x: (B, D, H, W).
        ys: (B, K, D, H, W), of each route its L steps in the order of the visit.
        scan: a pattern of ``ordered_scan``.
    """
    positions = scan_positions(scan, *x.shape[2:]).to(x.device)
    return gather_routes(x, positions), merge_routes(ys.flatten(3), positions)


def with_grads(op, inputs: dict[str, Tensor], grad_y: Tensor | None = None, **kwargs):
    """(y, {name: gradient}) of ``op(*inputs)``; ``grad_y`` defaults to a fixed random one."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = op(**leaves, **kwargs)
    if grad_y is None:
        rng = torch.Generator(y.device).manual_seed(1)
        grad_y = torch.randn(y.shape, generator=rng, device=y.device, dtype=torch.float64)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype))
    return y.detach(), dict(zip(leaves, grads, strict=True))


#: (B, L, C) of all tokens, or their logits -> what a classifier makes of them.
_POOLS = {'mean': lambda x: x.mean(1), 'max': lambda x: x.amax(1), 'last': lambda x: x[:, -1],
          'all': lambda x: x}


class Classifier(nn.Module):
    """A backbone, the mean of its last map, its class token or its tokens, and a linear layer.

    Parameters are named ``backbone.*`` and ``head.fc.*``, as in mmpretrain's ImageClassifier, of
    which it is what matters for numbers.

    Args:
        backbone: with ``num_features``, the channels of its stages, and a tuple as result, whose
            last is a map (B, C, ...), a class token (B, C) or, with ``pool``, tokens (B, L, C).
        num_classes: of the linear layer.
        pool: of tokens: 'mean' or the 'last' of them, 'max' for the largest of their logits or
            'all' for the logits of each. It says nothing of maps and class tokens.
        hidden_dims: in place of the linear layer two of them with a tanh between, of this width,
            named ``head.layers.pre_logits`` and ``head.layers.head``, as in mmpretrain's
            VisionTransformerClsHead.
        with_maps: return a list of the logits and of what the backbone returns.
        head: of all that the backbone returns, in place of the linear layer.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, pool: str = '',
                 hidden_dims: int | None = None, with_maps: bool = False,
                 head: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        dims = backbone.num_features[-1]
        if head is not None:
            self.head = head
        elif hidden_dims is None:
            self.head = nn.ModuleDict(dict(fc=nn.Linear(dims, num_classes)))
        else:
            self.head = nn.ModuleDict(dict(layers=nn.Sequential(OrderedDict(
                pre_logits=nn.Linear(dims, hidden_dims), act=nn.Tanh(),
                head=nn.Linear(hidden_dims, num_classes)))))
        self.pool = pool
        self.with_maps = with_maps

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """What the backbone takes, to (B, num_classes), or (B, L, num_classes) of 'all'."""
        maps = self.backbone(x)
        logits = self._classify(maps)
        return [logits, *maps] if self.with_maps else logits

    def _classify(self, maps: tuple[Tensor, ...]) -> Tensor:
        if not isinstance(self.head, nn.ModuleDict):
            return self.head(maps)
        y = maps[-1]
        if 'layers' in self.head:
            return self.head['layers'](y if y.dim() == 2 else y.flatten(2).mean(2))
        if y.dim() == 3 and self.pool in ('max', 'all'):
            return _POOLS[self.pool](self.head['fc'](y))
        if y.dim() == 3 and self.pool:
            return self.head['fc'](_POOLS[self.pool](y))
        return self.head['fc'](y if y.dim() == 2 else y.flatten(2).mean(2))


class Segmentor(nn.Module):
    """A backbone and a 1x1 convolution on its last map, named as in mmseg's EncoderDecoder.

    Args:
        backbone: with ``num_features``, the channels of its stages.
        num_classes: of the convolution.
    """

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.ModuleDict(dict(
            conv_seg=nn.Conv2d(backbone.num_features[-1], num_classes, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits (B, num_classes, H, W)."""
        return self.decode_head['conv_seg'](self.backbone(x)[-1])


class WithNeck(nn.Module):
    """A backbone and the neck on its maps, named as in mmdet and mmseg."""

    def __init__(self, backbone: nn.Module, neck: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(x)))


class BlockAndNorm(nn.Module):
    """A block and the norm that it is given, where blocks share one."""

    def __init__(self, block: nn.Module, norm: nn.Module):
        super().__init__()
        self.block = block
        self.norm = norm

    def forward(self, x: Tensor, permutation: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.block(x, self.norm, permutation)


def run_with_permutations(model: Classifier, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the backbone of a classifier returns for 'input' with the permutations 'perms', after
    the logits if it is a vector."""
    features = model.backbone(inputs['input'], inputs['perms'])
    logits = [model.head['fc'](features[-1])] if features[-1].dim() == 2 else []
    return dict(output=[*logits, *features])


def run_with_order(block: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A block of SegMamba on 'input', (B, C, D, H, W), and the token that its order across slices
    visits at each step, 'order_slices'."""
    x = inputs['input']
    tokens = torch.arange(x[0, 0].numel(), device=x.device).view(1, -1, 1)
    return dict(output=block(x), order_slices=across_slices(tokens, block.num_slices).flatten())


def run_unit_cells(code: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The places on a Hilbert curve of the cells next to the first one, along x, y and z, at the
    depths 1 to 6."""
    cells = torch.eye(3, dtype=torch.long)
    return dict(depth_1_to_6=[code(cells, depth) for depth in range(1, 7)])


@torch.enable_grad()
def run_chamfer(distance: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Both kinds of the distance between clouds 'a' and 'b', and their gradients for 'a'."""
    results = {}
    for kind in ('cdl1', 'cdl2'):
        first = inputs['a'].detach().requires_grad_()
        results[kind] = distance(first, inputs['b'], kind)
        results[f'{kind}_grad_a'], = torch.autograd.grad(results[kind], first)
    return results


def by_heads(*tensors: Tensor, function: Callable[..., Tensor], heads: int) -> Tensor:
    """``function`` of sequences (B, T, C) by heads, (B, T, H, C / H), to (B, T, C); other tensors
    come to it as they are."""
    return function(*(t.unflatten(2, (heads, -1)) if t.dim() == 3 else t for t in tensors)
                    ).flatten(2)


def run_in_parts(mixer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A causal mixer on all tokens, and on the first ones together and the others one by one.

    Args:
        mixer: as :class:`vmamba_mm.layers.MambaMixer`.
        inputs: 'input' (B, L, C), and 'prefill_len', the number of tokens that go together.

    Returns:
        'output'; 'step_output' of the parts; 'state_after_prefill' and 'state_final', each with
        'conv' (B, D, d_conv), the last inputs of the convolution with zeros before the first, and
        'ssm' (B, D, N).
    """
    x, prefill = inputs['input'], inputs['prefill_len']
    tokens = x.detach()
    with torch.no_grad():
        before = state = mixer.init_state(len(x))
        if prefill > 1:
            _, before = mixer(tokens[:, :prefill - 1], state)
        outputs, state = mixer(tokens[:, :prefill], state)
        states, outputs = [_window(before, state)], [outputs]
        for token in tokens[:, prefill:].unbind(1):
            before = state
            y, state = mixer.step(token, before)
            outputs.append(y.unsqueeze(1))
        states.append(_window(before, state))
    return dict(output=mixer(x), step_output=torch.cat(outputs, 1), state_after_prefill=states[0],
                state_final=states[1])


def run_mamba2_in_parts(mixer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`run_in_parts` by the names in the numbers of Mamba-2.

    Args:
        mixer: as :class:`vmamba_mm.layers.Mamba2Mixer`.
        inputs: 'input' (B, L, C), and 'prefill_length', the number of tokens that go together.

    Returns:
        'output' of the parts, and the states after the first and the last of them.
    """
    parts = run_in_parts(mixer, dict(input=inputs['input'], prefill_len=inputs['prefill_length']))
    first, last = parts['state_after_prefill'], parts['state_final']
    return dict(output=parts['step_output'], conv_state=first['conv'], ssm_state=first['ssm'],
                conv_state_end=last['conv'], ssm_state_end=last['ssm'])


def run_ssd(ssd: Callable, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The result 'y' of the op ``ssd``, its 'final_state', and that of each packed sequence,
    'varlen_states', where 'cu_seqlens' says where they begin and end."""
    arguments = {{'initial_states': 'initial_state'}.get(name, name): value
                 for name, value in inputs.items() if name != 'cu_seqlens'}
    y, final_state = ssd(**arguments, return_final_state=True)
    results = dict(y=y, final_state=final_state)
    if 'cu_seqlens' in inputs:
        of_tokens = 'x', 'dt', 'B', 'C', 'z', 'seq_idx'
        states = []
        for start, end in pairwise(inputs['cu_seqlens'].tolist()):
            alone = {name: value[:, start:end] if name in of_tokens else value
                     for name, value in arguments.items()}
            states.append(ssd(**alone, return_final_state=True)[1])
            arguments.pop('initial_state', None)  # of the first sequence
        results['varlen_states'] = torch.cat(states)
    return results


def run_retention(retention: Callable, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The op ``retention`` on 'q', 'k' (B, H, L, N) and 'v' (B, H, L, P) with the decays 'gamma'.

    Returns:
        'y' (B, H, L, P) and 'final_state' (B, H, N, P).
    """
    tokens = (inputs[name].transpose(1, 2) for name in ('q', 'k', 'v'))
    y, state = retention(*tokens, inputs['gamma'].log(), return_final_state=True)
    return dict(y=y.transpose(1, 2), final_state=state.mT)


def run_rotation(rotate: Callable, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """``rotate_pairs`` of 'x' (..., L, N) by the positions of the tokens, as 'y'."""
    x = inputs['x']
    table = rotation_table(torch.arange(x.shape[-2], device=x.device), x.shape[-1], x.dtype)
    return dict(y=rotate(x, table))


def run_retention_layer(layer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The layer of RetNet in its own form, chunk by chunk and token by token.

    Returns:
        'output', 'output_chunkwise' and 'output_recurrent' (B, L, C), and the tables: 'decay' (H),
        logarithms, and 'angle' (N), by which each channel turns from token to token.
    """
    x = inputs['input']
    head_dim = layer.q_proj.out_features // layer.num_heads
    table = rotation_table(torch.ones(1, device=x.device), head_dim, x.dtype)
    with torch.no_grad():
        tokens = x.detach()
        chunkwise, _ = layer(tokens, layer.init_state(len(x)))
        state, steps = layer.init_state(len(x)), []
        for token in tokens.unbind(1):
            y, state = layer.step(token, state)
            steps.append(y)
    return dict(output=layer(x), output_chunkwise=chunkwise, output_recurrent=torch.stack(steps, 1),
                decay=log_decays(layer.num_heads, x), angle=_angles(table))


def run_retnet(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A RetNet in its own form, chunk by chunk and token by token.

    Returns:
        'output', a list of the logits (B, L, V), and 'output_chunkwise' and 'output_recurrent'.
    """
    tokens, states = inputs['input'], model.init_state(len(inputs['input']))
    with torch.no_grad():
        chunkwise, _ = model(tokens, states)
        steps = []
        for token in tokens.split(1, dim=1):
            logits, states = model(token, states)
            steps.append(logits)
    return dict(output=[model(tokens)], output_chunkwise=chunkwise,
                output_recurrent=torch.cat(steps, 1))


def run_masa(layer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of RMT with its decay, ``vmamba_mm.models.rmt.PlacedAttention``.

    Returns:
        'output'; 'mask', what is added to scores, of columns and of rows where the two are apart;
        'decay'; 'angle', by which each channel turns from pixel to pixel.
    """
    x = inputs['input']
    # The recorded cases are in fp64 but for the decay and the masks, which are in fp32.
    decay = layer.decay.float()
    masks = decay_masks(decay, *x.shape[1:3], layer.form)
    output = layer.attn(x, layer.places(x)._replace(decay=decay, masks=masks))
    table = rotation_table(torch.ones(1, device=x.device), layer.head_dim, x.dtype)
    return dict(output=output, mask=masks[0] if len(masks) == 1 else list(masks[::-1]),
                decay=decay, angle=_angles(table))


def attend_map(q: Tensor, k: Tensor, v: Tensor, *, height: int, width: int) -> tuple[Tensor, ...]:
    """The attention of MILA, of heads (B, n, L, P), and the table of its rotation (H, W, C / 2, 2).
    """
    table = map_rotation_table(height, width, q.shape[1] * q.shape[3], endpoint=False,
                               dtype=q.dtype, device=q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = linear_attention(q, k, v, turns=table.flatten(0, 1))
    return y.transpose(1, 2), table


def attend_map_by_head(q: Tensor, k: Tensor, v: Tensor, *, height: int, width: int,
                       augmented: bool | None) -> tuple[Tensor, ...]:
    """An attention of RAVLT, of heads (B, n, L, P), the cosines and sines of its rotation, (L, P),
    and by how much each channel of half a head turns from a row to the next.

    Args:
        augmented: of linear attention; None for softmax attention.
    """
    options = dict(endpoint=True, dtype=q.dtype, device=q.device)
    table = map_rotation_table(height, width, q.shape[3], **options).flatten(0, 1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    turns = table.repeat(1, q.shape[2], 1)
    y = rotary_attention(q, k, v, turns) if augmented is None else linear_attention(
        q, k, v, turns=turns, augmented=augmented)
    cos, sin = table.repeat_interleave(2, dim=1).unbind(-1)
    step = map_rotation_table(2, 1, q.shape[3], **options)[1, :, :q.shape[3] // 4]
    return y.transpose(1, 2), cos, sin, _angles(step)


def _angles(table):
    """By which each channel turns, of the table for a position of 1."""
    return table[0, :, 1].asin().repeat_interleave(2)


def _window(before, state):
    """A state with one more input of the convolution, from the state a token earlier."""
    conv = torch.cat([before.conv[:, :1].to(state.conv.dtype), state.conv], dim=1)
    return dict(conv=conv.transpose(1, 2), ssm=state.ssm)


class TokenScanAlone(nn.Module):
    """MambaIRv2's scan of sorted tokens, with the embedding that its layer has.

    Args:
        scan: :class:`vmamba_mm.models.mambair_v2.TokenScan`.
        size: H and W of the map.
        inner_rank, d_state: of the embedding.

    Shape: (B, H*W, C) and noise (B, H*W, T) -> (B, H*W, C).
    """

    def __init__(self, scan: nn.Module, size: tuple[int, int], inner_rank: int, d_state: int):
        super().__init__()
        self.scan, self.size = scan, size
        self.token = nn.Embedding(inner_rank, d_state)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.scan(x.unflatten(1, self.size), self.token.weight, noise).flatten(1, 2)


def restore_recording_tiles(x: Tensor, scale: int, restore: Callable
                            ) -> tuple[Tensor, list[list[int]]]:
    """The made-up function that official numbers of tiles are of, and the sizes it was given.

    Args:
        x: (B, C, H, W).
        scale: by which it repeats pixels.
        restore: ``restore_in_tiles``.
    """
    sizes = []

    def network(part):
        height, width = part.shape[2:]
        sizes.append([height, width])
        down, across = (torch.linspace(0, 1, n, dtype=torch.float32).to(part)
                        for n in (height, width))
        part = part + 0.1 * (down[:, None] + 2 * across) + part.mean()
        return F.interpolate(part, scale_factor=scale, mode='nearest')

    return restore(network, x, scale), sizes
