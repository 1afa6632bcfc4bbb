"""Wrong input is a ValueError wherever an op runs: kernels never see what does not fit together.

The mixers are on the CPU and on an emulated GPU; every other public op is on the CPU, for what
they check comes before a place to run is chosen.
"""

import emulated_cuda
import pytest
import torch
from op_specs import all_specs, cut

import vmamba_mm.ops
from vmamba_mm.ops import (
    across_slices,
    add_norm,
    along_slices,
    bi_wkv,
    channel_mixer,
    channels_last,
    conv_norm,
    conv_norm_gelu,
    decay_masks,
    masa,
    masa_mixer,
    nc_ssd_mixer,
    scan_norm,
    shift_mix,
    spatial_mixer,
    ss2d_scan_norm,
)

SPECS = [spec for spec in all_specs()
         if spec.name.removesuffix('_fwd') in vmamba_mm.ops.__all__ or spec.id.startswith('sum')]
MIXERS = [spec for spec in SPECS if str(spec).split()[0].endswith('_mixer')]
#: Sizes that one tensor alone has: (a taps of a convolution, or what is not used).
FREE = {('causal_conv', 'weight', 1), ('mamba_inner', 'conv_weight', 2), ('conv_norm', 'weight', 2),
        ('conv_norm', 'weight', 3), ('evaluate_batch_norm', 'branch', None)}


def changes(tensor):
    """(dimension, change) for every way to have one element or one dimension too few or too many.
    """
    for dim in range(tensor.dim()):
        yield dim, cut(dim)
        yield dim, lambda t, dim=dim: torch.cat((t, t.narrow(dim, 0, 1)), dim)
    yield None, lambda t: t[None]
    if tensor.dim():
        yield None, lambda t: t[0]


@pytest.fixture(params=['cpu', 'sm_90'])
def device(request):
    return request.param


@pytest.fixture
def place(device, compiled):
    """The CPU, or a GPU that is emulated there, on which a kernel would run."""
    if device == 'cpu':
        yield device
    elif emulated_cuda.IS_MISSING:
        pytest.skip('needs Linux and a C++ compiler')
    else:
        with emulated_cuda.emulated_gpu(compiled, (9, 0)):
            yield device


def in_single(inputs):
    return {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}


@pytest.mark.parametrize('spec', MIXERS, ids=str)
def test_parameters_of_mixers(spec, place):
    """Every parameter, whatever does not fit, on the CPU as on a GPU."""
    inputs = in_single(spec.make(*spec.kernel_shapes[0] if spec.kernel_shapes else spec.shapes[0]))
    spec.call(inputs)
    count = 0
    for name, tensor in inputs.items():
        for _, change in changes(tensor) if name not in spec.maps else ():
            with pytest.raises(ValueError, match='expects'):
                spec.call(inputs | {name: change(tensor)})
            count += 1
    assert count >= 20


@pytest.mark.parametrize('spec', [spec for spec in SPECS if spec not in MIXERS], ids=str)
def test_every_other_op(spec):
    """What one tensor is given in another shape is either right or a ValueError."""
    name = spec.name.removesuffix('_fwd')
    inputs = in_single(spec.make(*(spec.shapes or spec.kernel_shapes)[0]))
    for key, tensor in inputs.items():
        for dim, change in changes(tensor):
            wrong = inputs | {key: change(tensor)}
            if key in spec.maps:
                try:
                    results = spec.call(wrong)
                except ValueError:
                    continue
                for y in results if isinstance(results, tuple) else (results,):
                    assert y is None or y.isfinite().all()
            elif (name, key, dim) not in FREE and (name, key, None) not in FREE:
                with pytest.raises(ValueError):
                    spec.call(wrong)


# --- options, and tensors that specs have not ----------------------------------------------------

def vectors(*sizes):
    return [torch.zeros(size) for size in sizes]


def spatial(x=None, **options):
    half, square = torch.ones(8) / 2, torch.eye(8)
    return spatial_mixer(torch.ones(1, 3, 5, 8) if x is None else x, (half,) * 3, (square,) * 4,
                         half, half, **options)


def channel(**options):
    half, square = torch.ones(8) / 2, torch.eye(8)
    return channel_mixer(torch.ones(1, 3, 5, 8), (half,) * 2, (square,) * 3, **options)


def rmt(form='whole', dim=32, **options):
    linear = torch.eye(dim), torch.zeros(dim)
    lepe = torch.zeros(dim, 1, 5, 5), torch.zeros(dim)
    options = dict(decay=-torch.ones(2), turns=None) | options
    return masa_mixer(torch.ones(1, 3, 5, dim), linear, linear, linear, lepe, linear, form=form,
                      **options)


def vssd(**options):
    ones, A = torch.ones(32), -torch.ones(2)
    return nc_ssd_mixer(torch.ones(1, 5, 7, 104), torch.ones(64, 1, 3, 3), None, A, A, A, ones,
                        ones, **options)


@pytest.mark.parametrize('call, options, message', [
    (spatial, dict(mode='papers'), r"mode='papers' does not exist.*\('paper', 'official'\)"),
    (spatial, dict(x=torch.ones(3, 5, 8)), r'spatial_mixer expects x \(B, H, W, C\), 3 shares'),
    (spatial, dict(pixels=-1), 'pixels of at least 0'),
    (spatial, dict(share=0.3), 'share of 0 to 0.25'),
    (channel, dict(head_dim=3), 'channel_mixer expects .* a head_dim that divides C'),
    (channel, dict(head_dim=0), 'head_dim that divides C'),
    (channel, dict(share=-0.1), 'share of 0 to 0.25'),
    (rmt, dict(form='whol'), r"form='whol' does not exist.*\('decomposed', 'whole'\)"),
    (rmt, dict(decay=-torch.ones(3)), r'decay \(n\), n a divisor of the 32 channels, got \(3,\)'),
    (rmt, dict(decay=-torch.ones(2, 1)), r'decay \(n\), n a divisor'),
    (rmt, dict(decay=-torch.ones(0)), r'decay \(n\), n a divisor'),
    (rmt, dict(turns=torch.ones(5, 3, 8, 2)), r'turns must be \(H, W, P / 2, 2\)'),
    (rmt, dict(turns=torch.ones(3, 5, 8)), r'turns must be \(H, W, P / 2, 2\)'),
    (rmt, dict(masks=decay_masks(-torch.ones(2), 3, 5)), 'masks must be the decay_masks of form='),
    (rmt, dict(form='decomposed', masks=decay_masks(-torch.ones(2), 5, 3)), 'masks must be'),
    (vssd, dict(groups=0), 'groups of at least 1 that divide the 2 heads'),
    (vssd, dict(groups=3), 'groups of at least 1 that divide the 2 heads')])
def test_options_of_mixers(call, options, message, place):
    call()
    with pytest.raises(ValueError, match=message):
        call(**options)


X = torch.ones(1, 4, 4, 8)
ROUTES = (torch.ones(4, 4, 8), torch.ones(4, 8, 2), torch.zeros(4, 8), -torch.ones(32, 1),
          torch.ones(32))


@pytest.mark.parametrize('call, message', [
    (lambda: bi_wkv(*vectors(8, 8), X[0], X[0], mode='Official'), "mode='Official' does not exist"),
    (lambda: masa(*[torch.ones(1, 2, 2, 2, 4)] * 3, torch.ones(2), 'hole'), "form='hole' does not"),
    (lambda: decay_masks(torch.ones(2), 3, 3, 'hole'), "form='hole' does not exist"),
    (lambda: decay_masks(torch.ones(2, 1), 3, 3), r'decay must be \(n\)'),
    (lambda: scan_norm(X, *ROUTES, *vectors(4, 4), scan='crosses'), "scan='crosses' does not"),
    (lambda: scan_norm(torch.ones(1, 8, 4, 4), *ROUTES, torch.ones(8), None), 'norm_weight and'),
    (lambda: scan_norm(torch.ones(1, 8, 4, 4), *ROUTES, None, torch.ones(8)), 'norm_weight and'),
    (lambda: ss2d_scan_norm(torch.ones(1, 8, 4, 4), *ROUTES, *vectors(8, 4)),
     r'ss2d_scan_norm expects norm_bias of shape \(8,\)'),
    (lambda: ss2d_scan_norm(torch.ones(1, 8, 4, 4), *ROUTES, *vectors(4, 8), backend='chunked'),
     r'ss2d_scan_norm expects norm_weight of shape \(8,\)'),
    (lambda: add_norm(X, X, *vectors(8, 8), scale=torch.ones(4)), r'scale of shape \(1,\)'),
    (lambda: shift_mix(X, vectors(8, 8), head_dim=0), 'a head_dim that divides C'),
    (lambda: shift_mix(X, vectors(8, 8), share=0.5), 'share of 0 to 0.25'),
    (lambda: shift_mix(X, vectors(8, 8), -1), 'pixels of at least 0'),
    (lambda: across_slices(X, 2), r'across_slices expects x \(B, L, C\)'),
    (lambda: along_slices(X[0], 0), 'num_slices of at least 1'),
    (lambda: channels_last(X[0]), r'images must be \(B, C, H, W\)'),
    (lambda: conv_norm(X, torch.ones(2, 8, 2, 2), *vectors(2, 2, 2), stride=0), 'stride of at'),
    (lambda: conv_norm(X, torch.ones(2, 8, 2, 2), *vectors(2, 2, 2), stride=1, padding=-1),
     'padding of at least 0'),
    (lambda: conv_norm(X, torch.ones(2, 8, 5, 2), *vectors(2, 2, 2), stride=1),
     'a convolution of 5x2 expects maps of that size at least, got 4x4'),
    (lambda: conv_norm_gelu(X, torch.ones(2, 4, 5, 5), *vectors(2, 2, 2)), "weight .C', C, 3, 3")])
def test_options_of_other_ops(call, message):
    with pytest.raises(ValueError, match=message):
        call()
