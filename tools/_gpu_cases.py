"""The cases of check_gpu.py: every kernel of kernels/, forward and backward, on small inputs.

A case names the kernels' files that it is for; together these are all files. To test a change:
tests/tools/test_check_gpu.py, which compares them with the folder, and tests/ops/test_gpu_cases.py,
which runs some on an emulated GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from vmamba_mm import ops
from vmamba_mm.layers import (
    BiMambaMixer,
    ConvStem,
    LayerNorm,
    MambaBlock,
    RMSNorm,
    VSSBlock,
    run_blocks,
)
from vmamba_mm.ops.core import launch
from vmamba_mm.ops.fused.mlp import hidden
from vmamba_mm.ops.nc_ssd import cuda as nc_ssd_kernels
from vmamba_mm.ops.rmt_block import Weights, rmt_block
from vmamba_mm.ops.rotation import rotation_table
from vmamba_mm.ops.selective_scan import cuda_scan
from vmamba_mm.ops.ss2d_scan import schedule
from vmamba_mm.ops.ssd import cuda_launch as ssd_launch
from vmamba_mm.ops.wkv import cuda_launch as wkv_launch
from vmamba_mm.testing import (
    mamba_inner_inputs,
    selective_scan_inputs,
    ss2d_scan_inputs,
    ssd_inputs,
)

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
#: Whether kernels by groups of warps run; where there is no GPU, for the list of what there is.
BY_GROUPS = not torch.cuda.device_count() or launch.has_groups_of_warps(0)


class Case(NamedTuple):
    """``run(device)`` is for the files ``launches``. It may launch others, and, where the number of
    multiprocessors decides how work is cut, not each of them."""
    name: str
    launches: tuple[str, ...]
    run: Callable[[str], None]


def all_cases() -> list[Case]:
    return [case for make in (
        _ss2d_cases, _selective_scan_cases, _causal_conv_cases, _mamba_inner_cases, _ssd_cases,
        _nc_ssd_cases, _wkv_cases, _masa_cases, _vision_rwkv_cases, _fused_cases, _block_cases,
        _model_cases) for case in make()]


def _files(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f'{folder}/{name}.cu' for name in names)


SCAN1D = _files('scan1d', 'scan1d_fwd', 'scan1d_bwd', 'scan1d_finish')
CONV = _files('causal_conv', 'causal_conv_fwd', 'causal_conv_bwd')
SUMS = _files('fused', 'sum_parts')
NORM = _files('fused', 'norm_bwd')
MASA = _files('masa', 'masa_fwd', 'masa_bwd')


def _step(op: Callable, *args, autocast: torch.dtype | None = None, **kwargs) -> None:
    """``op`` without gradients, and with those by all leaves; tensors may be in tuples."""
    tensors = [t for arg in (*args, *kwargs.values())
               for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, torch.Tensor)]
    with torch.autocast(tensors[0].device.type, autocast or HALF, enabled=autocast is not None):
        with torch.no_grad():
            op(*args, **kwargs)
        results = op(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [t for t in tensors if t.requires_grad]
    torch.autograd.grad([y for y in results if y is not None and y.requires_grad], leaves,
                        [torch.ones_like(y) for y in results if y is not None and y.requires_grad],
                        allow_unused=True)


def _leaf(*shape: int, dtype: torch.dtype = SINGLE, device: str, scale: float = 1.0
          ) -> torch.Tensor:
    """The numbers are those of the CPU, on every device."""
    return (scale * torch.randn(shape)).to(device, dtype).requires_grad_()


def _op_case(name: str, launches: tuple[str, ...], op: Callable, make: Callable[[], dict],
             setting: Callable = contextlib.nullcontext, **kwargs) -> Case:
    """``op`` by its CUDA kernels; ``setting`` is a context in which it runs."""
    def run(device):
        inputs = {key: t.to(device).requires_grad_(t.is_floating_point())
                  for key, t in make().items()}
        with setting():
            _step(op, **inputs, **kwargs, backend='cuda')

    return Case(f'{op.__name__}, {name}', launches, run)


def _setting(module, name: str, value) -> Callable:
    """A context in which the module has this value, and no launch remembers another."""
    @contextlib.contextmanager
    def setting():
        before = getattr(module, name)
        setattr(module, name, value)
        launch.forget()
        try:
            yield
        finally:
            setattr(module, name, before)
            launch.forget()

    return setting


# --- scans ----------------------------------------------------------------------------------------

def _ss2d_cases() -> Iterator[Case]:
    odd = _files('ss2d_scan', 'ss2d_prepare', 'ss2d_scan_bwd', 'ss2d_finish')
    small = odd + _files('ss2d_scan', 'ss2d_merge')
    around, chained = (_files('ss2d_scan', name) for name in ('ss2d_scan_fwd', 'ss2d_scan_chained'))
    large = _files('scan', 'scan_prepare', 'scan_fwd', 'scan_bwd', 'scan_finish')
    combined = _files('scan', 'scan_combine')
    # Spans would be gone around by a cluster too, where the GPU has clusters.
    no_clusters = _setting(schedule, 'cluster_schedules', lambda *args: ())
    for name, shape, kwargs, dtype, norm, launches in (
            ('one scan', (2, 20, 5, 9), {}, HALF, True, small + around),
            ('in spans', (1, 36, 20, 31), {'rank': 3}, HALF, True, small + chained),
            ('around a cluster', (1, 36, 20, 31), {'rank': 3}, HALF, True, small),
            ('several images to a block', (530, 16, 7, 7), {}, HALF, True, small + around),
            ('odd channels, two routes', (2, 19, 6, 7), {'routes': 2, 'rank': 9}, HALF, False,
             odd),
            ('one route', (2, 18, 3, 30), {'routes': 1}, BRAIN, False, odd),
            ('N = 4', (2, 20, 9, 10), {'state': 4}, HALF, True, large),
            ('N = 16', (1, 36, 18, 20), {'state': 16, 'rank': 6}, HALF, True, large + combined),
            ('fp32', (2, 20, 9, 10), {}, SINGLE, True, large),
            ('fp32, N = 16', (1, 20, 20, 18), {'state': 16}, SINGLE, True, large + combined)):
        setting = no_clusters if name == 'in spans' else contextlib.nullcontext

        def make(shape=shape, kwargs=kwargs, dtype=dtype):
            inputs = ss2d_scan_inputs(*shape, **kwargs)
            return dict(inputs, x=inputs['x'].to(dtype))

        def make_norm(make=make, dim=shape[1]):
            return make() | dict(norm_weight=torch.ones(dim), norm_bias=torch.ones(dim))

        yield _op_case(name, launches, ops.ss2d_scan, make, setting)
        if norm:
            yield _op_case(name, (*launches, *NORM), ops.ss2d_scan_norm, make_norm, setting)


def _selective_scan_cases() -> Iterator[Case]:
    for state, dtype, length in ((1, SINGLE, 150), (16, HALF, 151), (16, HALF, 152),
                                 (40, SINGLE, 40)):
        def make(state=state, dtype=dtype, length=length):
            inputs = selective_scan_inputs(2, 2, 9, length, state, dtype=dtype)
            return inputs | dict(z=inputs['u'].clone(), initial_state=torch.ones(2, 18, state))

        for span in (None, 32):
            combined = _files('scan1d', 'scan1d_combine') if span else ()
            yield _op_case(f'N = {state}, L = {length}, spans of {span}', SCAN1D + combined,
                           ops.selective_scan, make, _setting(cuda_scan, 'max_span', span),
                           delta_softplus=True, reverse=length % 2 > 0)
        if state == 16:
            yield _op_case(f'N = {state}, L = {length}, in turns',
                           SCAN1D + _files('scan1d', 'scan1d_relay'), ops.selective_scan, make,
                           _setting(cuda_scan, 'relay', True), delta_softplus=True,
                           reverse=length % 2 > 0)


def _causal_conv_cases() -> Iterator[Case]:
    for taps, dtype, dim in ((4, HALF, 20), (3, SINGLE, 7)):
        def make(taps=taps, dtype=dtype, dim=dim, first=False):
            x, weight = torch.randn(2, 37, dim).to(dtype), torch.randn(dim, taps)
            return dict(x=x.transpose(1, 2).contiguous().transpose(1, 2) if first else x,
                        weight=weight, bias=weight[:, 0].clone(),
                        initial_state=x[:, :taps - 1].clone())

        yield _op_case(f'{taps} taps', CONV + SUMS, ops.causal_conv, make)
        yield _op_case(f'{taps} taps, channels first', CONV + SUMS, ops.causal_conv,
                       lambda make=make: make(first=True), reverse=True)


def _mamba_inner_cases() -> Iterator[Case]:
    for routes, dtype, dim in ((2, HALF, 72), (1, SINGLE, 6)):
        def make(routes=routes, dtype=dtype, dim=dim):
            inputs = mamba_inner_inputs(2, routes, dim, 37, 16, 3)
            return inputs | dict(xz=inputs['xz'].to(dtype))

        yield _op_case(f'{routes} directions', SCAN1D + CONV, ops.mamba_inner, make)


def _ssd_cases() -> Iterator[Case]:
    for shape, dtype in (((2, 150, 4, 40, 2, 24), BRAIN), ((1, 300, 2, 64, 1, 128), HALF),
                         ((2, 300, 3, 64, 1, 128), BRAIN), ((1, 70, 2, 16, 1, 16), SINGLE)):
        def make(shape=shape, dtype=dtype):
            inputs = ssd_inputs(*shape, dtype=dtype)
            batch, _, heads, dim, _, state = shape
            return inputs | dict(z=inputs['x'].clone(),
                                 initial_state=torch.ones(batch, heads, dim, state))

        for span in (None, 1):
            of_groups = '_groups' if BY_GROUPS and dtype == BRAIN and shape[-1] == 128 else ''
            files = _files('ssd', 'ssd_fwd', f'ssd_states{of_groups}', f'ssd_bwd{of_groups}',
                           *(('ssd_combine',) if span else ()))
            yield _op_case(f'{shape}, spans of {span}', files, ops.ssd, make,
                           _setting(ssd_launch, 'max_span', span), dt_softplus=True,
                           reverse=shape[1] == 150)


def _nc_ssd_cases() -> Iterator[Case]:
    files = _files('nc_ssd', 'nc_ssd_states', 'nc_ssd_out', 'nc_ssd_bwd')
    for shape, dtype in (((2, 150, 4, 40, 1, 48), BRAIN), ((1, 300, 6, 24, 3, 64), HALF),
                         ((1, 70, 2, 16, 1, 128), SINGLE)):
        for spans in (None, 1, 2):
            added = _files('nc_ssd', 'nc_ssd_sum') if spans == 2 else ()
            yield _op_case(f'{shape}, {spans} spans', files + added, ops.nc_ssd,
                           lambda shape=shape, dtype=dtype: ssd_inputs(*shape, dtype=dtype),
                           _setting(nc_ssd_kernels, 'force_spans', spans), dt_softplus=True)

    def run(device, dtype, shape):
        batch, height, width, heads, dim, state = shape
        inner, channels = heads * dim, heads * dim + 2 * state
        leaf = lambda *size, **kwargs: _leaf(*size, device=device, **kwargs)  # noqa: E731
        A = (-torch.rand(heads) - 0.1).to(device).requires_grad_()
        width_of_rows = -(-(inner + channels + heads) // 8) * 8
        _step(ops.nc_ssd_mixer, leaf(batch, height, width, width_of_rows, dtype=dtype),
              leaf(channels, 1, 3, 3), leaf(channels), A, leaf(heads), leaf(heads), leaf(inner),
              leaf(inner))

    dwconv = _files('fused', 'dwconv', 'dwconv_bwd')
    for dtype, shape in ((HALF, (2, 9, 7, 2, 64, 64)), (SINGLE, (1, 5, 6, 4, 8, 16))):
        yield Case(f'nc_ssd_mixer, {str(dtype)[6:]}', files + dwconv + NORM,
                   lambda device, dtype=dtype, shape=shape: run(device, dtype, shape))


def _wkv_cases() -> Iterator[Case]:
    for length, dtype in ((61, HALF), (200, SINGLE)):
        def make(length=length, dtype=dtype, scale=1.0, more=0.0):
            k, v = torch.randn(2, 2, length, 40).to(dtype)
            return dict(w=torch.randn(40) * scale + more, u=torch.randn(40), k=k, v=v)

        for warps in (None, 2):
            where = f'L = {length}, {warps} warps'
            setting = _setting(wkv_launch, 'max_warps', warps)
            yield _op_case(where, _files('wkv', 'wkv_fwd', 'wkv_bwd')
                           + (_files('wkv', 'wkv_combine') if warps else ()), ops.wkv,
                           lambda make=make: make() | dict(state=torch.ones(2, 3, 40)), setting)
            for mode, files in (('paper', ('bi_wkv_fwd', 'bi_wkv_bwd')),
                                ('official', ('bi_wkv_official_fwd', 'bi_wkv_official_bwd'))):
                yield _op_case(f'{mode}, {where}', _files('wkv', *files), ops.bi_wkv,
                               lambda make=make, n=length: make(scale=1 / n), setting, mode=mode)
            yield _op_case(f'strong decays, {where}', _files('wkv', 'bi_wkv_fwd', 'bi_wkv_bwd'),
                           ops.bi_wkv, lambda make=make: make(more=9.0), setting)


# --- attention and mixers -------------------------------------------------------------------------

def _masa_cases() -> Iterator[Case]:
    def places(heads, height, width, dim, turned, device):
        decay = -torch.linspace(0.1, 1, heads).to(device)
        numbers = torch.arange(height * width).view(height, width)
        return decay, rotation_table(numbers, dim, SINGLE).to(device) if turned else None

    def run(device, form, shape, dtype, turned):
        decay, turns = places(shape[3], *shape[1:3], shape[4], turned, device)
        q, k, v = (_leaf(*shape, dtype=dtype, device=device) for _ in range(3))
        _step(lambda q, k, v: ops.masa(q, k, v, decay, form, turns=turns), q, k, v)

    # Lines of up to 16, 32 and 64 pixels, and maps as a whole, are other kernels.
    for form, shape, dtype, turned in (
            ('decomposed', (2, 3, 5, 5, 16), HALF, True),
            ('decomposed', (1, 17, 33, 3, 32), BRAIN, True),
            ('decomposed', (1, 60, 3, 2, 32), SINGLE, False),
            ('whole', (2, 7, 7, 3, 32), HALF, True),
            ('whole', (1, 3, 6, 1, 16), SINGLE, False)):
        yield Case(f'masa, {form}, {shape}', MASA, lambda device, args=(form, shape, dtype, turned):
                   run(device, *args))

    def run_mixer(device, form, shape, autocast, dtype):
        batch, height, width, heads, head_dim = shape
        dim = heads * head_dim
        pairs = [(_leaf(*size, device=device, scale=0.2), _leaf(dim, device=device))
                 for size in [(dim, dim)] * 3 + [(dim, 1, 5, 5), (dim, dim)]]
        decay, turns = places(heads, height, width, head_dim, True, device)
        _step(lambda x, *pairs: ops.masa_mixer(x, *pairs, decay, turns, form),
              _leaf(batch, height, width, dim, dtype=dtype, device=device), *pairs,
              autocast=autocast)

    lepe = _files('masa', 'lepe', 'lepe_bwd')
    for name, form, shape, autocast, dtype, more in (
            ('lepe, half', 'decomposed', (2, 9, 11, 2, 32), HALF, HALF, _files('fused', 'cast')),
            ('lepe, whole', 'whole', (2, 7, 7, 3, 16), BRAIN, BRAIN, _files('fused', 'cast')),
            ('lepe, fp32', 'decomposed', (1, 3, 5, 1, 32), None, SINGLE, ())):
        yield Case(f'masa_mixer, {name}', MASA + lepe + SUMS + more,
                   lambda device, args=(form, shape, autocast, dtype): run_mixer(device, *args))

    def run_block(device, form, shape, dtype):
        """With layer scale, and a factor of each sample as of drop path."""
        batch, height, width, heads, head_dim = shape
        dim, hidden = heads * head_dim, 2 * heads * head_dim
        sizes = Weights(*[(dim,)] * len(Weights._fields))._replace(
            pos=(dim, 1, 3, 3), lepe=(dim, 1, 5, 5), conv=(hidden, 1, 3, 3),
            q=(dim, dim), k=(dim, dim), v=(dim, dim), out=(dim, dim), fc1=(hidden, dim),
            fc2=(dim, hidden), fc1_bias=(hidden,), conv_bias=(hidden,))
        weights = [_leaf(*size, device=device, scale=0.2) for size in sizes]
        decay, turns = places(heads, height, width, head_dim, True, device)
        scales = torch.ones(batch, device=device), None
        _step(lambda x, *weights: rmt_block(x, Weights(*weights), decay, turns, scales, form, 1e-6,
                                            dtype),
              _leaf(batch, height, width, dim, dtype=dtype, device=device), *weights)

    for name, form, shape, dtype in (('half', 'decomposed', (2, 5, 7, 2, 16), HALF),
                                     ('whole', 'whole', (2, 3, 5, 1, 32), SINGLE)):
        yield Case(f'rmt_block, {name}', MASA + lepe + SUMS + _files('fused', 'layer_scale'),
                   lambda device, args=(form, shape, dtype): run_block(device, *args))


def _vision_rwkv_cases() -> Iterator[Case]:
    shift, gates = _files('fused', 'shift_mix'), _files('fused', 'gates')

    def run_shift(device, shape, dtype, count, pixels, head_dim, out_dtype):
        shares = tuple(_leaf(shape[3], device=device) for _ in range(count))
        _step(lambda x, shares: ops.shift_mix(x, shares, pixels, head_dim=head_dim,
                                              out_dtype=out_dtype),
              _leaf(*shape, dtype=dtype, device=device), shares)

    for name, *args in (('half', (2, 7, 5, 32), HALF, 3, 1, None, None),
                        ('fp32 to half', (1, 4, 3, 80), SINGLE, 2, 1, None, HALF),
                        ('heads, two pixels', (1, 2, 3, 64), BRAIN, 2, 2, 32, None),
                        ('one pixel', (1, 1, 1, 16), SINGLE, 3, 1, None, None)):
        yield Case(f'shift_mix, {name}', shift + SUMS,
                   lambda device, args=args: run_shift(device, *args))

    def run_gates(device, shape, dtype):
        x, other = (_leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        _step(ops.squared_relu, x)
        _step(ops.sigmoid_gate, x, other)

    for shape, dtype in (((2, 3, 5, 24), HALF), ((1, 4100), BRAIN), ((3, 4), SINGLE)):
        yield Case(f'gates, {shape}', gates,
                   lambda device, shape=shape, dtype=dtype: run_gates(device, shape, dtype))

    def run_spatial(device, shape, dtype, mode):
        dim = shape[3]
        _step(lambda x, shares, weights, w, u: ops.spatial_mixer(x, shares, weights, w, u,
                                                                 mode=mode),
              _leaf(*shape, dtype=dtype, device=device),
              tuple(_leaf(dim, device=device) for _ in range(3)),
              tuple(_leaf(dim, dim, device=device, scale=dim ** -0.5) for _ in range(4)),
              _leaf(dim, device=device), _leaf(dim, device=device))

    paper, official = (_files('wkv', f'{name}_fwd', f'{name}_bwd')
                       for name in ('bi_wkv', 'bi_wkv_official'))
    for shape, dtype, mode, files in (((2, 5, 7, 32), HALF, 'paper', paper),
                                      ((1, 8, 9, 48), SINGLE, 'official', official)):
        yield Case(f'spatial_mixer, {mode}', shift + gates + files,
                   lambda device, args=(shape, dtype, mode): run_spatial(device, *args))

    def run_channel(device, shape, dtype, head_dim):
        dim = shape[3]
        _step(lambda x, shares, weights: ops.channel_mixer(x, shares, weights, head_dim=head_dim),
              _leaf(*shape, dtype=dtype, device=device),
              tuple(_leaf(dim, device=device) for _ in range(2)),
              tuple(_leaf(*size, device=device, scale=dim ** -0.5)
                    for size in ((2 * dim, dim), (dim, 2 * dim), (dim, dim))))

    for name, *args in (('half', (2, 5, 7, 32), HALF, None), ('fp32', (1, 3, 4, 48), SINGLE, 16)):
        yield Case(f'channel_mixer, {name}', shift + gates,
                   lambda device, args=args: run_channel(device, *args))


# --- what surrounds them --------------------------------------------------------------------------

def _fused_cases() -> Iterator[Case]:
    def run_norms(device, dtype, dim):
        x, branch = (_leaf(3, 5, 7, dim, dtype=dtype, device=device) for _ in range(2))
        weight, bias = _leaf(dim, device=device), _leaf(dim, device=device)
        _step(ops.layer_norm, x, weight, bias)
        _step(ops.rms_norm, x, weight)
        _step(ops.add_norm, x, branch, weight, bias, scale=torch.ones(3, device=device))

    def run_convolutions(device, dtype, dim):
        x, branch = (_leaf(2, 9, 11, dim, dtype=dtype, device=device) for _ in range(2))
        weight, bias = _leaf(dim, 1, 3, 3, device=device), _leaf(dim, device=device)
        _step(ops.dwconv_silu, x, weight, bias)
        _step(ops.dwconv_add, x, weight, bias, branch, scale=torch.ones(2, device=device))

    def run_mlps(device, dtype, autocast, dim):
        x = _leaf(2, 5, 7, dim, dtype=dtype, device=device)
        w1, w2 = (_leaf(*size, device=device, scale=0.2) for size in ((4 * dim, dim),
                                                                      (dim, 4 * dim)))
        b1, b2 = _leaf(4 * dim, device=device), _leaf(dim, device=device)
        weight = _leaf(4 * dim, 1, 3, 3, device=device)
        _step(ops.mlp, x, w1, b1, w2, b2, autocast=autocast)
        _step(ops.conv_mlp, x, w1, b1, weight, _leaf(4 * dim, device=device), w2, b2,
              autocast=autocast)

    def run_first_half(device, shape):
        x, w, b = (torch.randn(size).to(device, HALF) for size in ((600, 200), (456, 200), (456,)))
        with _setting(hidden, 'force', shape)():
            for save in (False, True):
                hidden.hidden_layer(x, w, b, save)

    def run_batch_norm(device):
        for dtype in (HALF, SINGLE):
            x = torch.randn(2, 5, 7, 24).to(device, dtype)
            mean, weight = torch.randn(2, 24).to(device)
            with torch.no_grad():
                ops.evaluate_batch_norm(x, mean, weight.abs(), weight, mean, residual=x, relu=True)

    def run_stem(device):
        with torch.no_grad(), torch.autocast(device, HALF):
            ConvStem(3, 96).to(device)(torch.randn(2, 3, 19, 37).to(device))

    for name, dtype, dim in (('half', HALF, 96), ('fp32', SINGLE, 40)):
        yield Case(f'norms, {name}', _files('fused', 'add_norm') + NORM + SUMS,
                   lambda device, dtype=dtype, dim=dim: run_norms(device, dtype, dim))
        yield Case(f'depthwise convolutions, {name}',
                   _files('fused', 'dwconv', 'dwconv_bwd') + SUMS,
                   lambda device, dtype=dtype, dim=dim: run_convolutions(device, dtype, dim))
    for name, dtype, autocast in (('half', HALF, HALF), ('fp32', SINGLE, None)):
        yield Case(f'MLPs, {name}', _files('fused', 'gelu', 'column_sums'),
                   lambda device, dtype=dtype, autocast=autocast:
                   run_mlps(device, dtype, autocast, 16))
    if BY_GROUPS:
        for shape in hidden.SHAPES:
            yield Case(f'first half of an MLP, {shape}', _files('fused', 'linear_gelu'),
                       lambda device, shape=shape: run_first_half(device, shape))
    yield Case('batch norm', _files('fused', 'batch_norm'), run_batch_norm)
    yield Case('stem', _files('fused', 'stem'), run_stem)


def _block_cases() -> Iterator[Case]:
    def run_block(device, dtype):
        """The step-by-step path, which a hook chooses, and the whole as one op."""
        block = VSSBlock(36, mlp_ratio=2.0, drop_path=0.5, with_cp=False,
                         ssm_cfg={'ssm_ratio': 2.0, 'conv_bias': True}).to(device)
        for hook in (None, lambda *args: None):
            if hook is not None:
                block.mlp.register_forward_hook(hook)
            x = torch.randn(3, 5, 9, 36).to(device).requires_grad_()
            with torch.autocast(device, dtype, enabled=dtype != SINGLE):
                block(x).float().sum().backward()
                with torch.no_grad():
                    block(x)

    def run_mamba_blocks(device, dtype, norm):
        """As one op each, and in inference as one op together."""
        blocks = [MambaBlock(BiMambaMixer(40, dt_rank=3), norm(40)).to(device)
                  for _ in range(2)]
        x = torch.randn(2, 37, 40).to(device).requires_grad_()
        with torch.autocast(device, dtype, enabled=dtype != SINGLE):
            sum(run_blocks(blocks, x)).float().sum().backward()
            with torch.no_grad():
                run_blocks(blocks, x)

    blocks = _files('mamba_blocks', 'gather', 'scatter') + _files('scan1d', 'scan1d_gate')
    for name, dtype, launches, norm in (('half', HALF, blocks, RMSNorm),
                                        ('fp32', SINGLE, (), LayerNorm)):
        yield Case(f'block, {name}', _files('fused', 'add_norm'),
                   lambda device, dtype=dtype: run_block(device, dtype))
        yield Case(f'Mamba blocks, {name}', SCAN1D + launches,
                   lambda device, dtype=dtype, norm=norm: run_mamba_blocks(device, dtype, norm))


def _model_cases() -> Iterator[Case]:
    """Training and inference, of which some parts are other kernels, in both dtypes."""
    def run(device, name, arch, size, by_steps=False):
        from vmamba_mm import models  # needs mmengine, unlike all other cases

        model = getattr(models, name)(arch).to(device)
        for module in model.modules() if by_steps else ():
            if hasattr(module, 'norm1'):  # a block, which a hook keeps from being one op
                module.norm1.register_forward_hook(lambda *args: None)
        x = torch.randn(2, 3, *size).to(device)
        for dtype in (HALF, SINGLE):
            with torch.autocast(device, dtype, enabled=dtype != SINGLE):
                sum(y.float().sum() for y in model.train()(x)).backward()
                with torch.no_grad():
                    model.eval()(x)

    rmt = ('RMT', dict(embed_dims=(32, 32, 64, 32), depths=(1, 1, 1, 1), num_heads=(2, 1, 2, 2),
                       mlp_ratios=(2, 2, 2, 2), layer_scales=(0.5, 0, 0, 0)), (72, 56))
    yield Case('model, RMT, step by step', MASA, lambda device: run(device, *rmt, by_steps=True))
    for name, arch, size, launches in (
            (*rmt, MASA),
            ('VisionRWKV', dict(embed_dims=48, depth=2, patch_size=4, image_size=16,
                                formula='official', post_norm=True, layer_scale=0.5), (40, 20),
             _files('fused', 'shift_mix', 'gates')),
            ('VSSD', dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), d_state=8),
             (40, 36), _files('nc_ssd', 'nc_ssd_states', 'nc_ssd_out', 'nc_ssd_bwd')),
            ('VMUNet', dict(embed_dims=48, depths=(1, 2), decoder_depths=(2, 1), d_state=16),
             (40, 20), _files('scan', 'scan_fwd', 'scan_bwd') + NORM)):
        yield Case(f'model, {name}', launches,
                   lambda device, args=(name, arch, size): run(device, *args))
